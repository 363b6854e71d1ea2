"""A process that looks at an untrusted file gives up, first, all that it will not need.

``enter`` leaves the calling process able to read the files that it is for, to compute, and to
write in one scratch folder.  It cannot reach the network, start a process, signal another one, or
change anything elsewhere, and it is held to limits of memory, time and file size.  There is no
way back, also not for native code that a hostile file might get to run.

Linux: Landlock and seccomp (``sandbox_linux``).  macOS: the profile of ``macos_profile``, entered
by ``sandbox_init``, the call behind the program sandbox-exec; there reading stays allowed.  The
macOS half cannot be run on the Linux machines where this is tested; so ``enter`` ends by trying
the forbidden acts and raises if one of them works, and a file is refused rather than read without
a sandbox.

This module is imported by the child process and therefore needs nothing but Python.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.converters.pytorch import sandbox_linux

MEMORY_EXIT = 86  # exit code of a process that the memory watch ended
_WATCH_S = 0.02
_MAX_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sandboxed process may use, counted from the moment that it enters.

    Attributes:
        memory_bytes: address space on Linux, resident memory on macOS, beyond what it has.
        cpu_s: processor time.
        wall_s: time on the clock; the parent process keeps it.
        file_bytes: the longest file that it may write.
    """

    memory_bytes: int
    cpu_s: int
    wall_s: float
    file_bytes: int


def why_unavailable() -> str | None:
    """Say in a few words why this machine cannot sandbox, or return None if it can."""
    if sys.platform == "linux":
        return sandbox_linux.why_unavailable()
    if sys.platform == "darwin":
        found = hasattr(ctypes.CDLL(None), "sandbox_init")
        return None if found else "this macOS has no sandbox_init"
    return f"{sys.platform} has neither Landlock nor sandbox-exec"


def enter(scratch: Path, *, readable: Sequence[Path], limits: Limits) -> None:
    """Confine the calling process, for good; it must have one thread.

    Args:
        scratch: the folder that stays writable.
        readable: what stays readable besides, and besides Python's own modules.
        limits: what the process may use.

    Raises:
        OSError: the process is not, or not wholly, confined; it must stop.
    """
    scratch = scratch.resolve(strict=True)
    _set_limits(limits)
    if sys.platform == "linux":
        modules = [Path(folder) for folder in (*sys.path, sys.prefix, sys.base_prefix) if folder]
        sandbox_linux.restrict(scratch, [*readable, *modules])
    elif sys.platform == "darwin":
        _restrict_macos(scratch)
        watch_memory(limits.memory_bytes + _peak_bytes())
    else:
        raise OSError(str(why_unavailable()))
    _prove(scratch)


def macos_profile(scratch: Path) -> str:
    """Return the macOS sandbox profile: read anything, write below ``scratch``, nothing else.

    Raises:
        ValueError: the path cannot be written in a profile.
    """
    text = str(scratch)
    if not text.startswith("/") or not text.isprintable():
        raise ValueError(f"{text!r} cannot be a scratch folder")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    rules = [
        "(version 1)",
        "(deny default)",
        "(allow file-read*)",
        "(allow sysctl-read)",
        "(allow signal (target self))",
        f'(allow file-write* (subpath "{quoted}"))',
    ]
    return "\n".join(rules) + "\n"


def watch_memory(limit_bytes: int) -> None:
    """End the process when its resident memory has passed a limit; for macOS, which has none."""

    def watch() -> None:
        while _peak_bytes() <= limit_bytes:
            time.sleep(_WATCH_S)
        os._exit(MEMORY_EXIT)

    threading.Thread(target=watch, daemon=True).start()


def _set_limits(limits: Limits) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = int(used.ru_utime + used.ru_stime) + 1 + limits.cpu_s
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    _limit(resource.RLIMIT_CPU, cpu_s)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + limits.memory_bytes)


def _limit(kind: int, value: int) -> None:
    """Set a limit that cannot be raised again; one that is lower already stays."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _restrict_macos(scratch: Path) -> None:
    """Enter the profile of ``macos_profile``."""
    libc = ctypes.CDLL(None, use_errno=True)
    init = libc.sandbox_init
    init.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_char_p)]
    init.restype = ctypes.c_int
    reason = ctypes.c_char_p()
    if init(macos_profile(scratch).encode(), 0, ctypes.byref(reason)) != 0:
        raise OSError(f"sandbox_init: {(reason.value or b'').decode(errors='replace')}")


def _peak_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prove(scratch: Path) -> None:
    """Try what must fail.

    Raises:
        OSError: something worked.
    """
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("write outside the scratch folder", lambda: _write_beside(scratch)),
        ("reach the network", _reach_network),
        ("start a process", _start_process),
    ]
    if sys.platform == "linux":
        attempts.append(("read any folder", lambda: os.listdir("/")))
    for what, attempt in attempts:
        try:
            attempt()
        except PermissionError:
            continue
        raise OSError(f"the sandbox let the process {what}")


def _write_beside(scratch: Path) -> None:
    path = scratch.parent / f"{scratch.name}.outside"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    path.unlink()


def _reach_network() -> None:
    """Connect a datagram socket to this machine's discard port, which sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("127.0.0.1", 9))


def _start_process() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
