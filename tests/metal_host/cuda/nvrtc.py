"""NVRTC, NVIDIA's compiler as a library: CUDA text → cubin.  It needs neither GPU nor driver."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from ..errors import MslError

WHEEL = "nvidia-cuda-nvrtc"
INCLUDE = Path(__file__).parent / "include"
FLAGS = (
    *("-default-device", "-std=c++17", "-minimal", f"-I{INCLUDE}"),
    "-fmad=false",  # products that are fused are written so
    "-Xptxas=-v",  # registers, spills and shared memory go to the log
)


@functools.cache
def library_path() -> Path | None:
    """The library in NVIDIA's wheel, None where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = Path(place).glob("*/lib/libnvrtc.so.*")
        newest = max(found, key=lambda path: int(path.suffix[1:]), default=None)
        if newest is not None:
            return newest
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise MslError(f"NVRTC is not installed: pip install {WHEEL}")
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _check(result: int, call: str) -> None:
    if result:
        raise MslError(f"NVRTC: {call}: {_library().nvrtcGetErrorString(result).decode()}")


def version() -> str:
    """Such as 13.5."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"{major.value}.{minor.value}"


def compile_cubin(source: str, *, arch: str = "sm_90") -> tuple[bytes, str]:
    """Compile CUDA text.

    Args:
        source: a unit of ``translate``.
        arch: the GPUs that it is for.

    Returns:
        The cubin, and what the compiler said.

    Raises:
        MslError: NVRTC is missing, or the text does not compile; with the compiler's words.
    """
    library, program = _library(), ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"unit.cu", 0, None, None
    )
    _check(created, "nvrtcCreateProgram")
    try:
        flags = [flag.encode() for flag in (f"-arch={arch}", *FLAGS)]
        result = library.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
        )
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if result:
            raise MslError(f"NVRTC: {log[:6000]}")
        return _read(program, "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _check(library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    held = ctypes.create_string_buffer(size.value)
    _check(library[f"nvrtcGet{what}"](program, held), f"nvrtcGet{what}")
    return held.raw
