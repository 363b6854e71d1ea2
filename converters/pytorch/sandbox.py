"""A sandbox for a process that reads an untrusted file.

After ``enter`` the calling process can read the specified files, compute, and write to one scratch
folder.  It cannot use the network, start a process, signal another one, or change anything
elsewhere, and its memory, time and file sizes are limited.  This cannot be undone, not even by
native code that a hostile file might run.

Linux: Landlock and seccomp (``sandbox_linux``).  macOS: the profile of ``macos_profile``, entered
by ``sandbox_init``, which the program sandbox-exec uses; reading remains allowed there.  The macOS
part cannot be run on the Linux machines where this is tested.  Therefore ``enter`` ends by trying
what is forbidden and raises if anything works, so that a file is never read without a sandbox.

The child process imports this module, so it only needs the standard library.
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
    """Limits of a sandboxed process, counted from the moment that it enters.

    Attributes:
        memory_bytes: additional address space on Linux, additional resident memory on macOS.
        cpu_s: processor time.
        wall_s: elapsed time; enforced by the parent process.
        file_bytes: maximum size of a file that it writes.
    """

    memory_bytes: int
    cpu_s: int
    wall_s: float
    file_bytes: int


def why_unavailable() -> str | None:
    """Return in a few words why this machine has no sandbox, or None if it has one."""
    if sys.platform == "linux":
        return sandbox_linux.why_unavailable()
    if sys.platform == "darwin":
        has_sandbox = hasattr(ctypes.CDLL(None), "sandbox_init")
        return None if has_sandbox else "this macOS has no sandbox_init"
    return f"{sys.platform} has neither Landlock nor sandbox-exec"


def enter(scratch: Path, *, readable: Sequence[Path], limits: Limits) -> None:
    """Confine the calling process permanently; it must have one thread.

    Args:
        scratch: folder that remains writable.
        readable: other files that remain readable, in addition to Python's modules.
        limits: limits of the process.

    Raises:
        OSError: the process is not completely confined; it must stop.
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
    """Return the macOS sandbox profile: read anything, write in ``scratch``, nothing else.

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
    """End the process when its resident memory exceeds a limit; macOS cannot enforce one."""

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
    """Set a limit that cannot be raised again; a lower existing limit remains."""
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
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prove(scratch: Path) -> None:
    """Try forbidden operations.

    Raises:
        OSError: one of them succeeded.
    """
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("write outside the scratch folder", lambda: _write_outside(scratch)),
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


def _write_outside(scratch: Path) -> None:
    path = scratch.parent / f"{scratch.name}.outside"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    path.unlink()


def _reach_network() -> None:
    """Connect a datagram socket to this machine's discard port, which sends no data."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("127.0.0.1", 9))


def _start_process() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
