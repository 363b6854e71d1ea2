"""Hostile answers: no script runs and no request leaves, with the server's policy or without."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.app.host import AppHost
from tests.app.page import until
from tests.app.xss_strings import xss_strings
from tests.helpers.browser import SEEN, Watch

pytest.importorskip("playwright")
from playwright.sync_api import expect  # noqa: E402

pytestmark = pytest.mark.slow

TOGETHER = 40
WAIT_MS = 60_000
_NEVER = (
    "img,script,iframe,object,embed,style,link,video,audio,image,use,base,meta,"
    "[style]:not(.katex *),[style*=url],[onerror],[onload],[onfocus],[autofocus],[srcset],[src]"
)


def imported(app: AppHost, texts: list[str]) -> list[int]:
    """Conversations whose titles, prompts and answers are the texts."""
    conversations = []
    for start in range(0, len(texts), TOGETHER):
        messages: list[dict[str, Any]] = []
        for text in texts[start : start + TOGETHER]:
            for role in ("user", "assistant"):
                parent = len(messages) - 1 if messages else None
                group = {"tokens": [text], "accepted": 0, "drafted": 1, "source": text, "ms": 1}
                messages.append(
                    {"role": role, "text": text, "parent": parent, "groups": [group], "model": text}
                )
        title = texts[start]
        conversations.append({"title": title, "messages": messages, "leaf": len(messages) - 1})
    whole = {"format": "mlx-mtp conversations", "version": 1, "conversations": conversations}
    reply = app.client.post("/import", content=json.dumps(whole).encode())
    assert reply.status_code == 201, reply.text
    return reply.json()["conversations"]


def test_there_are_hundreds_of_hostile_strings():
    assert len(xss_strings()) >= 300


@pytest.mark.parametrize("without_policy", [False, True])
def test_nothing_runs_and_nothing_leaves(browser, app: AppHost, without_policy):
    context = browser.new_context(bypass_csp=without_policy)
    context.add_init_script(SEEN)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    watch = Watch(page, app.url)
    page.goto(app.address)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled(timeout=WAIT_MS)
    for number in imported(app, xss_strings()):
        page.evaluate(f"location.hash = 'c={number}'")
        page.reload()
        expect(page.get_by_role("article").last).to_be_attached(timeout=WAIT_MS)
        until(page, lambda: not page.locator(".math:not(.done)").count())
        page.mouse.move(600, 400)
        page.get_by_label("Message", exact=True).focus()
        for link in page.locator("article a").all()[:5]:
            assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        hrefs = page.evaluate("[...document.querySelectorAll('article a')].map((a) => a.href)")
        assert all(each.startswith(("http://", "https://", "mailto:")) for each in hrefs), hrefs
        assert page.evaluate(f"document.querySelectorAll('article :is({_NEVER})').length") == 0
    assert page.evaluate("window.ran") == 0
    assert watch.foreign == []
    assert page.url.startswith(app.url)
    context.close()


def test_hostile_answers_that_stream_in_do_no_harm_either(browser, app: AppHost):
    context = browser.new_context(bypass_csp=True)
    context.add_init_script(SEEN)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    watch = Watch(page, app.url)
    page.goto(app.address)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled(timeout=WAIT_MS)
    box = page.get_by_label("Message", exact=True)
    box.fill("\n\n".join(xss_strings()[::12]))
    box.press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_role("article", name="Assistant")).to_contain_text("tokens", timeout=WAIT_MS)
    assert page.evaluate("window.ran") == 0
    assert watch.foreign == []
    context.close()
