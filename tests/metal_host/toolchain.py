"""Which compilers there are, where built things are kept, and what the machine's CPU adds."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import MslError

HERE = Path(__file__).parent
MIN_CLANG = 15
CLANGS = [*(f"clang-{version}" for version in range(22, MIN_CLANG - 1, -1)), "clang"]


def cache_folder() -> Path:
    """$MLX_MTP_METAL_HOST_CACHE, or a folder of this name where the platform keeps caches."""
    chosen = os.environ.get("MLX_MTP_METAL_HOST_CACHE")
    if chosen:
        folder = Path(chosen)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library/Caches/mlx-mtp/metal-host"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "mlx-mtp/metal-host"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        folder = Path(tempfile.gettempdir()) / f"mlx-mtp-metal-host-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    return folder


def run(command: Sequence[str | Path], *, text: str | None = None) -> str:
    """Standard output; MslError with the compiler's own words if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    if done.returncode:
        raise MslError(f"{Path(words[0]).name}: {done.stderr[:6000]}")
    return done.stdout


@functools.cache
def version_of(compiler: str) -> str:
    """The first line that the compiler says of itself: part of every cache key."""
    return run([compiler, "--version"]).split("\n")[0]


def _has_half(compiler: str) -> bool:
    """Whether C++ has _Float16 there: g++ 12 has it on x86-64 alone, 13 on aarch64 too."""
    probe = "_Float16 twice(_Float16 x) { return x + x; }\n"
    command = [compiler, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=probe, capture_output=True, text=True).returncode == 0


@functools.cache
def cxx() -> str:
    """The compiler that kernels run through: $CXX, g++ or clang++, the first that has half."""
    clangs = [name.replace("clang", "clang++") for name in CLANGS]
    for name in (os.environ.get("CXX"), "g++", "clang++", *clangs):
        if name and shutil.which(name) and _has_half(name):
            return name
    raise MslError("neither a g++ nor a clang++ with _Float16 is installed")


@functools.cache
def is_gcc(compiler: str) -> bool:
    """On macOS g++ is another name of clang."""
    return "clang" not in run([compiler, "--version"]).lower()


@functools.cache
def find_clang() -> str | None:
    """A clang of version 15 or newer: $CLANG, clang-N or clang; None where there is none."""
    for name in (os.environ.get("CLANG"), *CLANGS):
        if not name or not shutil.which(name):
            continue
        version = re.search(r"version (\d+)", version_of(name))
        if version and int(version.group(1)) >= MIN_CLANG:
            return name
    return None


def clang() -> str:
    name = find_clang()
    if name is None:
        raise MslError(f"clang {MIN_CLANG} or newer is needed (say where with $CLANG)")
    return name


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """Half conversions and fused multiply-add in hardware, where this x86-64 CPU has them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return tuple(f"-m{name}" for name in ("f16c", "fma") if name in words)


def shared_library_flags() -> list[str]:
    """Kernels leave the runtime's symbols open: it is loaded before them, for all to see."""
    if sys.platform == "darwin":
        return ["-dynamiclib", "-undefined", "dynamic_lookup"]
    return ["-shared"]
