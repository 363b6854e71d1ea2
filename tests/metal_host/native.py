"""The runtime as a shared library: built once for its source, loaded once for the process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from ctypes import c_char_p, c_int, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path

from . import toolchain

FOLDER = toolchain.HERE / "runtime"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-pthread"]
MODES = {"fast": 0, "check": 1, "check0": 1, "count": 2}


class Launch(ctypes.Structure):
    """`struct msl_launch` of state.h, field by field."""

    _fields_ = [
        ("entry", c_void_p),
        ("args", c_void_p),
        ("counts_live", c_void_p),
        ("counts", c_void_p),
        ("counts_sink", c_void_p),
        ("seed", c_uint64),
        ("grid", c_uint32 * 3),
        ("threads", c_uint32 * 3),
        ("threadgroup_limit", c_uint32),
        ("max_threads", c_uint32),
        ("stack_bytes", c_uint32),
        ("workers", c_uint32),
        ("mode", c_int32),
        ("strict", c_int32),
        ("preempt", c_int32),
        ("sum_order", c_int32),
    ]


def library_path() -> Path:
    """Where the runtime for this source and this compiler is, built if need be."""
    compiler = toolchain.cxx()
    sources = sorted(FOLDER.glob("*.cpp"))
    texts = [path.read_text() for path in [*sources, *sorted(FOLDER.glob("*.h"))]]
    words = [toolchain.version_of(compiler), *FLAGS, *toolchain.shared_library_flags(), *texts]
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
    library = toolchain.cache_folder() / f"runtime-{key}.so"
    if not library.exists():
        beside = library.with_suffix(f".{os.getpid()}.so")
        flags = [*FLAGS, *toolchain.shared_library_flags(), "-x", "c++", "-"]
        unit = "".join(f'#include "{path}"\n' for path in sources)  # one unit compiles 3x faster
        toolchain.run([compiler, *flags, "-o", beside], text=unit)
        beside.rename(library)
    return library


@functools.cache
def runtime() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_GLOBAL)
    lib.msl_host_alloc.restype = c_void_p
    lib.msl_host_alloc.argtypes = [c_uint64]
    lib.msl_host_free.argtypes = [c_void_p, c_uint64]
    lib.msl_host_region.argtypes = [c_int, c_void_p, c_uint64, c_int, c_int, c_int, c_char_p]
    lib.msl_host_threadgroup_argument.argtypes = [c_int, c_uint32]
    lib.msl_host_run.argtypes = [ctypes.POINTER(Launch)]
    lib.msl_host_error.argtypes = [c_int, c_char_p, c_int, ctypes.POINTER(c_uint64)]
    lib.msl_host_collective.argtypes = [c_int, c_char_p, c_int, ctypes.POINTER(c_uint64)]
    lib.msl_host_base.restype = c_uint64
    lib.msl_host_base.argtypes = [c_void_p]
    return lib


def named_value(function, i: int) -> tuple[str, int]:
    """What msl_host_error and msl_host_collective give for entry i: a text and a number."""
    text, value = ctypes.create_string_buffer(1200), c_uint64()
    function(i, text, len(text), ctypes.byref(value))
    return text.value.decode(errors="replace"), value.value


def values(function, count: int, *args: int) -> list[int]:
    """The numbers that msl_host_totals and msl_host_buffer write."""
    out = (c_uint64 * count)()
    function(*args, out)
    return list(out)
