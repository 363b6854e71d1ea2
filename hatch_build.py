"""Refuses to make a wheel whose chat page is missing or older than its sources.

The built page is committed, so that installing from a checkout needs no Node; this keeps it true.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")
FOLDERS = ("src", "public")
HINT = "run `npm ci && npm run build` in apps/chat"


class PageHook(BuildHookInterface):
    """Checks the page before a wheel is made, but not for editable installs: work goes on there."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files."""
        del build_data
        if self.target_name == "wheel" and version != "editable":
            check_page(Path(self.root) / "apps" / "chat")


def check_page(folder: Path) -> None:
    """Check that the page was built from the sources beside it.

    Raises:
        RuntimeError: it was not built, or from other sources.
    """
    page, stamp = folder / "dist" / "index.html", folder / "dist" / "stamp.json"
    if not page.is_file() or not stamp.is_file():
        raise RuntimeError(f"{folder / 'dist'} holds no built page: {HINT}")
    if json.loads(stamp.read_text(encoding="utf-8")).get("sources") != sources_hash(folder):
        raise RuntimeError(f"{folder / 'dist'} was built from other sources: {HINT}")


def sources_hash(folder: Path) -> str:
    """The hash that ``stamp.mjs`` writes, computed again."""
    below = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    paths = [*(folder / name for name in SOURCES), *below]
    whole = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in paths):
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        whole.update(f"{name} {content}\n".encode())
    return whole.hexdigest()
