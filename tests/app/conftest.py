"""The app and a page of it in a real browser.

Every test of a page starts with ``INITIAL_SETTINGS``, and ends with a check that the page has made
no foreign request and logged no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.app.host import AppHost, hosted_app
from tests.helpers.browser import Watch, launch

INITIAL_SETTINGS = {"theme": "system", "panel": "", "marks": True}
REFUSED = "Failed to load resource: the server responded with a status of 400 (Bad Request)"


# One browser for all tests of this folder.  Not one for the session: Playwright keeps an event loop
# running in this thread, in which no other test could start one.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppHost]:
    history = tmp_path_factory.mktemp("app") / "history.sqlite3"
    with hosted_app(history, unwatched_s=60.0) as host:  # a busy machine loads pages slowly
        yield host


@pytest.fixture
def page(browser: Any, app: AppHost) -> Iterator[Any]:
    from tests.app.page import WAIT_MS, expect

    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    app.client.put("/settings", json={"values": INITIAL_SETTINGS}).raise_for_status()
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    watch = Watch(page, app.url)
    page.goto(app.address)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    yield page
    context.close()
    assert watch.foreign == [] and set(watch.errors) <= {REFUSED}
