"""The page in a real browser: everyday use, by mouse and by keyboard alone."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.app.host import AppHost
from tests.app.page import CODE, answers, finished, send, until

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_key_leaves_the_address_bar(page: Page, app: AppHost):
    assert app.token not in page.url
    assert page.evaluate("document.cookie") == ""


def test_markdown_streams_with_highlighted_code_that_can_be_copied(page: Page):
    send(page, CODE)
    finished(page)
    answer = answers(page)
    expect(answer.locator("h3")).to_have_text("Sorted")
    expect(answer.locator("strong")).to_have_text("sorts")
    expect(answer.locator("code .hljs-keyword").first).to_have_text("def")
    expect(answer.locator("td.align-right")).to_have_text("2")
    answer.locator(".code").get_by_role("button", name="Copy").click()
    expect(answer.locator("button.copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return sorted(x)\n"
    expect(page.locator("header h1")).to_have_text(re.compile("^Sorted"))


def test_escape_stops_and_keeps_the_text(page: Page):
    send(page, "slow")
    expect(answers(page)).to_contain_text("slowslow")
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_edits_and_second_answers_are_branches(page: Page):
    send(page, "first version")
    finished(page)
    answers(page).get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_contain_text("2/2")
    finished(page)
    page.get_by_role("article", name="You").get_by_role("button", name="Edit").click()
    box = page.get_by_label("Edit your message")
    box.fill("second version")
    box.press("Enter")
    finished(page)
    expect(answers(page)).to_contain_text("second version")
    you = page.get_by_role("article", name="You")
    you.get_by_role("button", name="Previous version").click()
    expect(you).to_contain_text("first version")
    expect(answers(page)).to_contain_text("2/2")
    answers(page).get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_contain_text("1/2")


def test_history_survives_a_reload(page: Page):
    send(page, "remember the platypus")
    finished(page)
    page.reload()
    expect(answers(page)).to_contain_text("remember the platypus")
    expect(page.locator(".conversations .current")).to_contain_text("platypus")


def test_an_answer_continues_after_a_reload(page: Page):
    send(page, "slow")
    expect(answers(page)).to_contain_text("slow")
    page.reload()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    length = len(answers(page).inner_text())
    until(page, lambda: len(answers(page).inner_text()) > length + 200)
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")


def test_search_rename_and_delete(page: Page):
    send(page, "an axolotl in the pond")
    finished(page)
    page.get_by_label("Search conversations").fill("axolotl")
    row = page.locator(".conversations li")
    expect(row).to_have_count(1)
    row.hover()
    row.get_by_role("button", name=re.compile("^Rename")).click()
    page.get_by_label("Title").fill("Pond animals")
    page.keyboard.press("Enter")
    expect(row).to_contain_text("Pond animals")
    row.hover()
    row.get_by_role("button", name=re.compile("^Delete")).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".conversations")).to_contain_text("No conversations found")


def test_export_and_import(page: Page, tmp_path):
    send(page, "a message in a bottle")
    finished(page)
    for kind, part in (("Markdown", "## You\n\na message"), ("JSON", '"role": "assistant"')):
        with page.expect_download() as download:
            page.get_by_role("button", name="Export", exact=True).click()
            page.get_by_role("button", name=f"Save as {kind}").click()
        path = tmp_path / kind
        download.value.save_as(path)
        assert part in path.read_text(encoding="utf-8")
    page.locator("input[type=file]").set_input_files(
        {
            "name": "bottle.json",
            "mimeType": "application/json",
            "buffer": (tmp_path / "JSON").read_bytes(),
        }
    )
    expect(page.get_by_role("status").first).to_contain_text("1 conversation imported")
    page.locator("input[type=file]").set_input_files(
        {"name": "bad.json", "mimeType": "application/json", "buffer": b"{"}
    )
    expect(page.get_by_role("status").first).to_contain_text("not valid JSON")


def test_every_step_is_underlined_and_hovering_describes_it(page: Page):
    send(page, "Every step of this *answer* has its own line below it, as it should.")
    finished(page)
    sizes = page.evaluate(
        "Object.fromEntries([...CSS.highlights].map(([name, marks]) => [name, marks.size]))"
    )
    assert sizes["step-even"] and sizes["step-odd"] and sizes["step-one"]
    answers(page).locator("em").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("drafts accepted, from mask tokens")
    answers(page).get_by_role("button", name="Step by step").click()
    steps = page.get_by_role("listbox", name=re.compile("^Steps"))
    steps.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".step-facts")).to_contain_text("Step 2 of")
    expect(page.locator(".step-facts")).to_contain_text("draft 1 of 4, accepted")
    page.keyboard.press("End")
    expect(page.locator(".step[aria-selected=true]")).to_have_count(1)


def test_the_meter_the_positions_and_the_speed_limits(page: Page):
    page.get_by_role("button", name="Steps", exact=True).click()
    send(page, "count the tokens of every step and draw a line of them, please, " * 5)
    finished(page)
    panel = page.get_by_role("complementary", name="Steps")
    expect(panel.get_by_role("img")).to_have_attribute(
        "aria-label", re.compile(r"\d on average over the last 16 steps")
    )
    expect(panel.locator(".positions tbody tr")).to_have_count(4)
    expect(panel.locator(".reasons")).to_contain_text("A step of 4 rows takes about 1.30 times")
    page.get_by_role("button", name="Steps", exact=True).first.click()


def test_the_slider_for_k_and_sampling_reach_the_engine(page: Page, app: AppHost):
    page.get_by_role("button", name="Settings").click()
    slider = page.locator("#drafts")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.get_by_label(re.compile("^Temperature")).fill("0.5")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label(re.compile("^Top k")).focus()
    send(page, "one draft at most for this answer, " * 2)
    finished(page)
    number = int(page.url.partition("#c=")[2])
    conversation = app.conversation(number)
    assert (
        conversation["options"]["num_draft_tokens"] == 1 and conversation["options"]["temp"] == 0.5
    )
    assert conversation["system_prompt"] == "Be brief."
    assert max(len(group["tokens"]) for group in conversation["messages"][1]["groups"]) == 2
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Steps", exact=True).first.click()
    reasons = page.get_by_role("complementary", name="Steps").locator(".reasons")
    expect(reasons).to_contain_text("Verifying 1 draft takes about 1.10 times as long")


def test_a_race_reports_identical_hashes_and_the_speed_up(page: Page):
    send(page, "run, and say the same, " * 8)
    finished(page)
    page.get_by_role("button", name="Race").click()
    dialog = page.get_by_role("dialog", name="Race")
    dialog.get_by_role("button", name="Start").click()
    expect(dialog.get_by_role("status")).to_contain_text("Identical output: both hashes")
    expect(dialog.get_by_role("status")).to_contain_text(re.compile(r"\d\.\d\dx the speed"))
    first, second = dialog.locator(".hash code").all_inner_texts()
    assert first == second and re.fullmatch("[0-9a-f]{64}", first)
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_a_race_reports_that_it_shared_the_model(page: Page, app: AppHost):
    page.get_by_role("button", name="Race").click()
    dialog = page.get_by_role("dialog", name="Race")
    dialog.get_by_label("Prompt").fill("run, and say the same, " * 4)
    body = {"messages": [{"role": "user", "content": "slow"}], "stream": True}
    bearer = {"Authorization": f"Bearer {app.token}"}
    with httpx.stream("POST", f"{app.url}/v1/chat/completions", json=body, headers=bearer) as other:
        assert other.status_code == 200
        dialog.get_by_role("button", name="Start").click()
        status = dialog.get_by_role("status")
        expect(status).to_contain_text("unreliable: 2 other answers used the model")
        expect(status).to_contain_text("Identical output: both hashes")


def test_another_model_is_loaded_with_a_progress_bar(page: Page, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    page.locator("button.model").click()
    page.get_by_role("combobox", name="Model").select_option(label="Folder…")
    page.get_by_label("Model folder").fill(str(tmp_path))
    page.get_by_role("button", name="Load").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.locator("button.model")).to_contain_text(tmp_path.name)
    expect(page.get_by_role("progressbar")).to_have_count(0)
    page.locator("button.model").click()


def test_everything_by_keyboard(page: Page):
    press = page.keyboard.press
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("typed by hand")
    press("Enter")
    finished(page)
    press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.type(", twice")
    press("Enter")
    finished(page)
    expect(answers(page)).to_contain_text("typed by hand, twice")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    press("Alt+n")
    expect(answers(page)).to_have_count(0)
    press("Alt+f")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.type("by hand, twice")
    expect(page.locator(".conversations li")).to_have_count(1)
    press("ArrowDown")
    press("Enter")
    expect(answers(page)).to_contain_text("twice")
    press("Alt+r")
    expect(page.get_by_role("dialog", name="Race")).to_be_visible()
    press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    press("Alt+f")
    press("ArrowDown")
    press("F2")
    page.keyboard.type("Renamed by hand")
    press("Enter")
    expect(page.locator("header h1")).to_have_text("Renamed by hand")
    page.locator(".conversations button.open").first.focus()
    press("Delete")
    expect(page.get_by_role("dialog")).to_be_visible()
    press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


RECORD_SUMMARIES = """() => {
    window.summaries = [];
    new MutationObserver(() => {
        for (const summary of document.querySelectorAll("summary")) {
            window.summaries.push(summary.textContent);
        }
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def test_reasoning_is_folded_and_not_copied(page: Page):
    page.evaluate(RECORD_SUMMARIES)  # a busy machine may look only when the answer is complete
    send(page, "think Let *me* see: \U0001d4b3, slowly, step by step|The **answer** is ready")
    details = answers(page).locator("details.reasoning")
    finished(page)
    assert "Reasoning …" in page.evaluate("window.summaries")
    expect(details.locator("summary")).to_have_text("Reasoning")
    shown = details.locator(".reasoning-text")
    expect(shown).to_be_hidden()
    expect(answers(page).locator(".text")).to_have_text("The answer is ready")
    details.locator("summary").click()
    expect(shown).to_have_text("Let *me* see: \U0001d4b3, slowly, step by step")
    answers(page).locator("strong").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("Step")
    answers(page).locator("footer").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("status").first).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "The **answer** is ready"
    page.reload()
    expect(answers(page).locator(".text")).to_have_text("The answer is ready")
    assert "</think>" not in answers(page).inner_text()
