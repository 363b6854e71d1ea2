"""Fixtures for the app and its page in a real browser, and helpers for tests of the page.

Every test starts with the settings of ``FIRST``, and ends with a check that the page has made no
foreign request and logged no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.app.host import AppHost, hosted_app
from tests.helpers.browser import Watch, launch

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

CODE = """\
# Sorted

This **sorts**:

```python
def f(x):
    return sorted(x)
```

| a | b |
|---|--:|
| 1 | 2 |"""
FIRST = {"theme": "system", "panel": "", "marks": True}
REFUSED = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(name="browser", scope="module")
def browser_fixture() -> Iterator[Any]:
    with sync_playwright() as playwright:
        opened = launch(playwright)
        yield opened
        opened.close()


@pytest.fixture(name="app", scope="module")
def app_fixture(tmp_path_factory) -> Iterator[AppHost]:
    history = tmp_path_factory.mktemp("app") / "history.sqlite3"
    with hosted_app(history, unwatched_s=60.0) as host:  # a busy machine loads pages slowly
        yield host


@pytest.fixture(name="page")
def page_fixture(browser, app) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    app.client.put("/settings", json={"values": FIRST}).raise_for_status()
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    watch = Watch(opened, app.url)
    opened.goto(app.address)
    expect(opened.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    yield opened
    context.close()
    assert watch.foreign == [] and set(watch.errors) <= {REFUSED}


def send(page: Page, text: str) -> None:
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")


def answers(page: Page) -> Any:
    return page.get_by_role("article", name="Assistant")


def finished(page: Page, count: int = 1) -> None:
    """Wait until ``count`` answers are shown and none is running."""
    expect(answers(page)).to_have_count(count)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for a condition; the page's policy forbids Playwright's own wait_for_function."""
    for _ in range(WAIT_MS // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("the condition never became true")
