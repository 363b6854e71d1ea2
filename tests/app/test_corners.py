"""The page in a real browser: large or unusual input, lost focus, and a lost engine or server."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.app.host import AppHost
from tests.app.page import CODE, answers, finished, send, until

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect  # noqa: E402

pytestmark = pytest.mark.slow

WIDE = "| " + " | ".join("column" * 4 for _ in range(8)) + " |\n|" + "---|" * 8 + "\n\nend"
ARABIC = "مرحبا بالعالم"
ENTER = """(init) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown",
    {key: "Enter", bubbles: true, cancelable: true, ...init}))"""
CUTTABLE = """
    const [ask, cut] = [window.fetch, new AbortController()];
    window.cut = () => cut.abort();
    window.fetch = (url, init) => ask(url, String(url).includes("/answers/") && !cut.signal.aborted
        ? {...init, signal: cut.signal} : init);
"""
RIGHT_ENDS = """(paragraph) => {
    const text = document.createRange();
    text.selectNodeContents(paragraph);
    return [text, paragraph].map((each) => each.getBoundingClientRect().right);
}"""
DROP = """(text) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], "some.json", {type: "application/json"}));
    for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(
        new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


def imported(app: AppHost, title: str, *, pairs: int) -> int:
    """Import a conversation of ``pairs`` questions and answers; returns its id."""
    whole = {
        "format": "mlx-mtp conversations",
        "version": 1,
        "conversations": [{"title": title, "leaf": 2 * pairs - 1, "messages": talk(pairs)}],
    }
    reply = app.client.post("/import", content=json.dumps(whole).encode())
    assert reply.status_code == 201, reply.text
    return reply.json()["conversations"][0]


def talk(pairs: int) -> list[dict[str, Any]]:
    return [
        {
            "role": ("user", "assistant")[at % 2],
            "text": f"line {at}\n\n" * 3,
            "parent": at - 1 if at else None,
            "groups": [],
            "model": "some",
        }
        for at in range(2 * pairs)
    ]


def test_the_focus_is_never_lost(page: Page):
    send(page, "first")
    finished(page)
    box = page.get_by_label("Message", exact=True)
    answers(page).get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("2/2")
    expect(box).to_be_focused()
    finished(page)
    answers(page).get_by_role("button", name="Previous version").focus()
    page.keyboard.press("Enter")
    expect(answers(page).get_by_role("button", name="Next version")).to_be_focused()
    edit = page.get_by_role("article", name="You").get_by_role("button", name="Edit")
    edit.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(edit).to_be_focused()
    row = page.locator(".conversations button.open").first
    row.focus()
    page.keyboard.press("F2")
    page.keyboard.type("named")
    page.keyboard.press("Enter")
    expect(page.locator(".conversations button.open").first).to_be_focused()
    expect(page).to_have_title("named - mlx-mtp")


@pytest.mark.parametrize("composing", [{"isComposing": True}, {"keyCode": 229}])
def test_the_enter_that_ends_a_composition_sends_nothing(page: Page, composing):
    box = page.get_by_label("Message", exact=True)
    box.fill("にほん")
    page.evaluate(ENTER, composing)
    expect(box).to_have_value("にほん")
    expect(answers(page)).to_have_count(0)
    page.evaluate(ENTER, {})
    finished(page)


def test_an_export_that_is_dropped_on_the_page_is_imported(page: Page, app: AppHost):
    number = imported(app, "from far away", pairs=1)
    text = app.client.get(f"/conversations/{number}/export?format=json").text
    app.client.delete(f"/conversations/{number}").raise_for_status()
    page.evaluate(DROP, text)
    expect(page.get_by_role("status").first).to_contain_text("1 conversation imported")
    expect(page.locator("header h1")).to_have_text("from far away")
    expect(page.locator(".drop")).to_have_count(0)


def test_an_unreachable_server_is_reported_until_it_responds(browser, app: AppHost):
    context = browser.new_context()
    page = context.new_page()
    page.goto(app.address)
    button = page.get_by_role("button", name="Send", exact=True)
    expect(button).to_be_enabled()
    page.route("**/app/api/**", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("mlx-mtp app is not responding")
    expect(button).to_be_disabled()
    page.unroute("**/app/api/**")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(button).to_be_enabled()
    context.close()


def test_an_answer_continues_after_a_lost_connection(browser, app: AppHost):
    context = browser.new_context()
    context.add_init_script(CUTTABLE)
    page = context.new_page()
    page.goto(app.address)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    send(page, "slow")
    expect(answers(page)).to_contain_text("slowslow")
    page.route("**/app/api/**", lambda route: route.abort())
    page.evaluate("cut()")
    expect(answers(page)).to_contain_text("The connection was lost")
    expect(page.get_by_role("alert")).to_be_visible()
    page.unroute("**/app/api/**")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")
    context.close()


def test_a_dead_engine_keeps_the_text_and_restarts(page: Page, app: AppHost):
    send(page, "die")
    expect(answers(page)).to_contain_text("the engine died")
    expect(answers(page)).to_contain_text("last words")
    app.wait_for("ok")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    send(page, "and on")
    finished(page, 2)
    expect(answers(page).last).to_contain_text("and on")


def test_the_error_of_a_model_that_fails_to_load_stays_visible(page: Page):
    page.locator("button.model").click()
    page.get_by_role("combobox", name="Model").select_option(label="Folder…")
    page.get_by_label("Model folder").fill("/no/such/folder")
    page.get_by_role("button", name="Load").click()
    panel = page.get_by_role("complementary", name="Model")
    expect(panel.get_by_role("alert")).to_contain_text("/no/such/folder is neither a folder nor")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    panel.get_by_role("button", name="Load").focus()
    page.keyboard.press("Escape")
    expect(panel).to_have_count(0)


def test_a_message_of_100_kb_is_folded(page: Page):
    send(page, "word " * 20_000)
    finished(page)
    said = page.get_by_role("article", name="You")
    expect(said.locator(".folded")).to_have_count(1)
    low = said.bounding_box()
    assert low and low["height"] < 400
    said.get_by_role("button", name="Show all 100,000 characters").click()
    high = said.bounding_box()
    assert high and high["height"] > 2000


def test_wide_tables_scroll_tasks_have_boxes_and_arabic_runs_right_to_left(page: Page):
    send(page, f"{WIDE}\n\n- [x] done\n\n{ARABIC}")
    finished(page)
    cells = answers(page).locator("th")
    assert cells.first.evaluate("cell => cell.clientHeight") < 60  # no word is broken
    table = answers(page).locator(".table")
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")
    expect(answers(page).locator("li")).to_have_text("☑ done")
    text, whole = answers(page).locator("p").last.evaluate(RIGHT_ENDS)
    assert text == pytest.approx(whole, abs=2)


def test_a_conversation_opens_at_its_end_and_back_opens_the_previous_one(page: Page, app: AppHost):
    numbers = [imported(app, title, pairs=100) for title in ("older", "newer")]
    page.reload()
    thread = page.locator(".thread")

    def is_at_end() -> bool:
        return thread.evaluate("box => box.scrollHeight - box.scrollTop - box.clientHeight") < 80

    for number, title in zip(numbers, ("older", "newer"), strict=True):
        page.locator(f'[data-conversation="{number}"]').click()
        expect(page.locator("header h1")).to_have_text(title)
        until(page, is_at_end)
        expect(page.get_by_role("button", name="Scroll to bottom")).to_have_count(0)
        thread.evaluate("box => box.scrollTo(0, 0)")
        expect(page.get_by_role("button", name="Scroll to bottom")).to_be_visible()
    page.go_back()
    expect(page.locator("header h1")).to_have_text("older")
    thread.evaluate("box => box.scrollTo(0, 0)")
    page.get_by_role("button", name="Scroll to bottom").click()
    until(page, is_at_end)


@pytest.mark.parametrize("part", ["session", "settings"])
def test_an_address_that_changes_while_the_page_starts_is_followed(browser, app: AppHost, part):
    number = imported(app, "opened early", pairs=1)
    context = browser.new_context()
    page = context.new_page()
    opened: list[str] = []

    def change(route: Any) -> None:
        page.evaluate(f"location.hash = 'c={number}'")
        route.continue_()

    page.route(f"**/app/api/{part}", change)
    page.on("request", lambda request: opened.append(request.url))
    page.goto(app.address)
    expect(page.locator("header h1")).to_have_text("opened early")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    assert page.url.endswith(f"#c={number}")
    assert sum(url.endswith(f"/conversations/{number}") for url in opened) == 1
    context.close()


def test_a_phone_shows_the_conversation_below_two_rows(browser, app: AppHost):
    app.client.put("/settings", json={"values": {"panel": "settings"}}).raise_for_status()
    context = browser.new_context(
        viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(app.address)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    expect(page.get_by_role("complementary", name="Settings")).to_have_count(0)
    send(page, CODE)
    finished(page)
    header = page.locator("header.bar").bounding_box()
    assert header and header["height"] < 90
    page.get_by_role("button", name="Menu").tap()
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    expect(page.get_by_role("button", name=re.compile("^Delete")).first).to_be_visible()
    page.locator(".backdrop").tap(position={"x": 340, "y": 400})
    expect(page.get_by_label("Search conversations")).to_be_hidden()
    expect(page.get_by_role("button", name="Menu")).to_be_focused()
    context.close()


def test_a_print_contains_only_the_whole_conversation(page: Page, app: AppHost):
    number = imported(app, "on paper", pairs=30)
    page.goto(f"{app.url}/#c={number}")
    page.reload()
    expect(page.get_by_role("article")).to_have_count(60)
    page.emulate_media(media="print")
    expect(page.get_by_role("button")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollHeight") > 3000
    page.emulate_media(media="screen")


def test_a_conversation_is_copied_as_markdown(page: Page):
    send(page, "to the clipboard")
    finished(page)
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_role("button", name="Copy as Markdown").click()
    expect(page.get_by_role("status").first).to_contain_text("Copied")
    assert "## You\n\nto the clipboard" in page.evaluate("navigator.clipboard.readText()")


def test_a_suggestion_starts_a_conversation(page: Page):
    page.get_by_role("button", name="Explain in simple words why the sky is blue.").click()
    finished(page)
    expect(answers(page)).to_contain_text("why the sky is blue")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
