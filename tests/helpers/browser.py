"""A real browser for the tests of the page: Debian's chromium, or Chrome where it is installed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
SEEN = "window.ran = 0; window.alert = () => { window.ran += 1; };"
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


def chromium() -> str | None:
    """Path of a browser; ``$CHROMIUM`` wins.  None where there is none."""
    if chosen := os.environ.get("CHROMIUM"):
        return chosen
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (MAC if sys.platform == "darwin" and Path(MAC).exists() else None)


def launch(playwright: Any) -> Any:
    """Start the browser; skips the test where there is none."""
    path = chromium()
    if path is None:
        pytest.skip("no chromium; .ci/browser installs it on Debian and Ubuntu")
    return playwright.chromium.launch(executable_path=path, args=list(FLAGS))


class Watch:
    """What a page did that it must not do.

    Attributes:
        foreign: requests that went anywhere but to the page's own server.
        errors: uncaught exceptions and errors on the console.
    """

    def __init__(self, page: Any, own: str) -> None:
        self.foreign: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self._request(request.url, own))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._console)

    def _request(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.foreign.append(url)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)
