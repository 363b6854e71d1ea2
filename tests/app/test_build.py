"""The built page: built from these sources, small, and without external requests."""

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
MAX_BYTES = 500_000
MAX_FIRST_BYTES = 180_000


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copied(tmp_path) -> Path:
    ignored = shutil.ignore_patterns("node_modules")
    return Path(shutil.copytree(CHAT, tmp_path / "chat", ignore=ignored))


def test_the_committed_page_was_built_from_these_sources(hook):
    hook.check_page(CHAT)


def test_a_changed_source_is_rejected(hook, copied):
    (copied / "src" / "tree.ts").write_text("// changed\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="other sources"):
        hook.check_page(copied)


def test_a_new_source_is_rejected(hook, copied):
    (copied / "src" / "new.ts").write_text("export {};\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="other sources"):
        hook.check_page(copied)


@pytest.mark.parametrize("name", ["index.html", "stamp.json"])
def test_a_missing_page_is_rejected(hook, copied, name):
    (copied / "dist" / name).unlink()
    with pytest.raises(RuntimeError, match="no built page"):
        hook.check_page(copied)


def test_the_page_is_small():
    sizes = [len(gzip.compress(path.read_bytes())) for path in _files()]
    assert sum(sizes) < MAX_BYTES


def test_the_page_refers_only_to_its_own_files():
    html = (CHAT / "dist" / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert names
    assert all((CHAT / "dist" / name.lstrip("/")).is_file() for name in names)
    assert "<style" not in html and not re.search(r"<script(?![^>]*src=)", html)


def test_the_first_load_is_small_and_without_katex():
    html = (CHAT / "dist" / "index.html").read_text(encoding="utf-8")
    first = [path for path in _files() if path.name in html and path.suffix in (".css", ".js")]
    assert len(first) == 2 and not any(b"mathrm{" in path.read_bytes() for path in first)
    assert sum(len(gzip.compress(path.read_bytes())) for path in first) < MAX_FIRST_BYTES
    assert any(b"mathrm{" in path.read_bytes() for path in _files())


def test_the_styles_load_only_the_fonts_of_katex():
    for path in _files():
        if path.suffix == ".css":
            css = path.read_text(encoding="utf-8")
            names = re.findall(r"url\(([^)]*)\)", css)
            assert "@import" not in css and bool(names) == path.name.startswith("katex-")
            assert all(re.fullmatch(r"/assets/KaTeX_[\w-]+\.woff2", name) for name in names)
            assert all((CHAT / "dist" / name.lstrip("/")).is_file() for name in names)


def _files() -> list[Path]:
    return [path for path in (CHAT / "dist").rglob("*") if path.is_file()]
