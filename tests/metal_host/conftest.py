"""Skip the executor's own tests where they passed before on the same files.

They test a tool that rarely changes; the checks of our kernels, which use it, always run. A file in
the cache folder, named by a hash of all that these tests depend on, lists the tests that passed.
`-m ""` (as in `make soak`) runs them anyway.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.metal_host import toolchain

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/metal_host", "metal", "mlx_mtp/backends/metal")


@functools.cache
def passed_file() -> Path:
    """The list for these files, this MLX and these compilers."""
    paths = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    digest = hashlib.sha256(f"{sys.version} {version('mlx')}".encode())
    for compiler in (toolchain.cxx(), toolchain.find_clang()):
        digest.update((toolchain.version_of(compiler) if compiler else "none").encode())
    for path in sorted(path for path in paths if "__pycache__" not in path.parts):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return toolchain.cache_folder() / f"passed-{digest.hexdigest()[:24]}.txt"


@functools.cache
def passed_tests() -> frozenset[str]:
    path = passed_file()
    return frozenset(path.read_text().splitlines() if path.exists() else ())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("markexpr") and item.nodeid in passed_tests():
        pytest.skip("passed before on the same files")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed and report.nodeid not in passed_tests():
        with passed_file().open("a") as file:  # a short line is appended at once
            file.write(f"{report.nodeid}\n")
