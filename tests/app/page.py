"""Helpers for tests of the page in a real browser; the fixtures are in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect  # noqa: E402

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
WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)


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
