"""Take the pictures of docs/app.md from an app that runs: its address, and where they go.

mlx-mtp app --no-browser --data-dir PICTURES
python tests/app/pictures.py 'http://127.0.0.1:.../#token=...' docs
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.helpers.browser import FLAGS, chromium

PROMPT = "Write a Python function that reverses a string, and explain it."
TOKENS = 64
WAIT_MS = 600_000


def take(page: Page, folder: Path) -> None:
    """Have an answer made and run a race; write four pictures."""
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Max tokens").fill(str(TOKENS))
    page.get_by_role("button", name="Steps", exact=True).click()
    box = page.get_by_label("Message", exact=True)
    box.fill(PROMPT)
    box.press("Enter")
    expect(page.locator(".message .facts")).to_contain_text("per second")
    box.focus()
    page.mouse.move(640, 650)  # away from what lights up below it
    page.get_by_label("Theme").select_option("light")
    page.screenshot(path=folder / "app-light.png")
    page.get_by_label("Theme").select_option("dark")
    page.screenshot(path=folder / "app-dark.png")
    page.get_by_role("complementary", name="Steps").get_by_role("button", name="Close").click()
    page.set_viewport_size({"width": 390, "height": 780})
    page.get_by_label("Theme").select_option("light", force=True)
    page.screenshot(path=folder / "app-phone.png")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.get_by_role("button", name="Race").click()
    dialog = page.get_by_role("dialog", name="Race")
    dialog.get_by_label("Max tokens").fill(str(TOKENS))
    dialog.get_by_role("button", name="Start").click()
    expect(dialog.get_by_role("status")).to_contain_text("tokens per second")
    page.screenshot(path=folder / "app-race.png")


def main() -> None:
    """Run it from the command line."""
    address, folder = sys.argv[1], Path(sys.argv[2])
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(WAIT_MS)
        page.goto(address)
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
        take(page, folder)
        browser.close()


if __name__ == "__main__":
    main()
