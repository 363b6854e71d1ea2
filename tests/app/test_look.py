"""Appearance and accessibility of the page: colours, phones, screen readers, the first paint."""

from __future__ import annotations

import re

import pytest

from tests.app.host import AppHost
from tests.app.page import CODE, answers, finished, send, until

pytest.importorskip("playwright")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Page, expect  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_until_they_are_chosen(page: Page, scheme):
    page.emulate_media(color_scheme=scheme)

    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return int(re.findall(r"\d+", colour)[0]) < 128

    page.get_by_label("Theme").select_option("system")
    assert is_dark() == (scheme == "dark")
    other = {"light": "dark", "dark": "light"}[scheme]
    page.get_by_label("Theme").select_option(other)
    until(page, lambda: is_dark() == (other == "dark"))
    page.get_by_label("Theme").select_option("system")


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(page: Page, width):
    page.set_viewport_size({"width": width, "height": 700})
    send(page, CODE)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Menu").click()
    expect(page.get_by_label("Search conversations")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Search conversations")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Close").click()


def test_screen_readers_get_sentences_not_tokens(page: Page):
    page.evaluate(
        """() => {
            window.announced = [];
            const watch = () => announced.push(document.querySelector('[role=log]').textContent);
            new MutationObserver(watch).observe(document.querySelector('[role=log]'),
                {childList: true, characterData: true, subtree: true});
        }"""
    )
    send(page, "One sentence. Two sentences. " * 10)
    finished(page)
    until(page, lambda: "Answer complete" in "".join(page.evaluate("announced")[-1:]))
    assert len(page.evaluate("announced")) <= 6


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, theme):
    page.get_by_label("Theme").select_option(theme)
    send(page, CODE)
    finished(page)
    violations = _serious(page)
    for name in ("Settings", "Steps"):
        page.get_by_role("button", name=name, exact=True).first.click()
        violations += _serious(page)
    answers(page).get_by_role("button", name="Step by step").click()
    violations += _serious(page)
    page.get_by_role("button", name="Race").click()
    violations += _serious(page)
    page.keyboard.press("Escape")
    page.get_by_role("complementary", name="Steps").get_by_role("button", name="Close").click()
    page.get_by_label("Theme").select_option("system")
    assert violations == []


def _serious(page: Page) -> list[str]:
    result = Axe().run(page)
    return [
        f"{each['id']}: {node['html'][:120]}"
        for each in result.response["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def test_without_the_key_the_page_explains_how_to_open_it(browser, app: AppHost):
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(app.url)
    expect(opened.get_by_role("heading")).to_have_text("Access key required")
    context.close()


def test_the_first_paint_is_fast(browser, app: AppHost):
    times: list[float] = []
    while len(times) < 10 and min(times, default=1000) >= 1000:  # others may use the machine
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(app.address)
        expect(opened.get_by_label("Message", exact=True)).to_be_visible()
        painted = "performance.getEntriesByName('first-contentful-paint')[0]"
        opened.wait_for_function(f"{painted} !== undefined")  # reported after the paint itself
        times.append(opened.evaluate(f"{painted}.startTime"))
        context.close()
    print(f"first contentful paint: {[round(each) for each in times]} ms")
    assert min(times) < 1000
