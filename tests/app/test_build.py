"""The built page: there, from these sources, small, and asking nobody else for anything."""

from __future__ import annotations

import gzip
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHAT = ROOT / "apps" / "chat"
MOST_BYTES = 500_000


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copied(tmp_path) -> Path:
    kept = shutil.ignore_patterns("node_modules")
    return Path(shutil.copytree(CHAT, tmp_path / "chat", ignore=kept))


def test_the_committed_page_was_built_from_these_sources(hook):
    hook.check_page(CHAT)


def test_a_changed_source_is_refused(hook, copied):
    (copied / "src" / "tree.ts").write_text("// changed\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="other sources"):
        hook.check_page(copied)


def test_a_new_source_is_refused(hook, copied):
    (copied / "src" / "new.ts").write_text("export {};\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="other sources"):
        hook.check_page(copied)


@pytest.mark.parametrize("name", ["index.html", "stamp.json"])
def test_a_missing_page_is_refused(hook, copied, name):
    (copied / "dist" / name).unlink()
    with pytest.raises(RuntimeError, match="no built page"):
        hook.check_page(copied)


def test_the_page_is_small():
    sizes = [len(gzip.compress(path.read_bytes())) for path in _files()]
    assert sum(sizes) < MOST_BYTES


def test_the_page_names_only_files_of_its_own():
    html = (CHAT / "dist" / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert names
    assert all((CHAT / "dist" / name.lstrip("/")).is_file() for name in names)
    assert "<style" not in html and not re.search(r"<script(?![^>]*src=)", html)


def test_the_styles_load_nothing():
    for path in _files():
        if path.suffix == ".css":
            assert not re.search(r"url\(|@import", path.read_text(encoding="utf-8"))


def _files() -> list[Path]:
    return [path for path in (CHAT / "dist").rglob("*") if path.is_file()]
