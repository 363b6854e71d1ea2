"""The Linux part of the sandbox: Landlock for files, seccomp for system calls, through ctypes.

Landlock removes the rights to write, create, rename or delete outside one folder, to read other
files than the specified ones, and to run programs.  The seccomp filter allows the few system calls
that reading a file and computing need, with harmless arguments; every other call fails with EPERM,
so there is no network, no new process, no signal to others, no change of modes, owners, times or
attributes.  Both remain in force until the process ends.

Needs Linux 5.13 or newer on x86-64 or arm64.  Numbers are those of the kernel's user interface.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

# name: (x86-64, arm64); None where the machine has no such call.
_ALWAYS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "mincore": (27, 232),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "unlink": (87, None),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "gettid": (186, 178),
    "readahead": (187, 213),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "fadvise64": (221, 223),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "fallocate": (285, 47),
    "dup3": (292, 24),
    "getcpu": (309, 168),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
# Allowed only with some arguments; see ``_checked_calls``.
_CHECKED: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None),
    "openat": (257, 56),
    "clone": (56, 220),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prctl": (157, 167),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
}
# The C library falls back on an older call if these do not exist.
_ABSENT: dict[str, tuple[int | None, int | None]] = {"clone3": (435, 435), "openat2": (437, 437)}
_NEWEST_CALL = 450  # later numbers fail as on an older kernel

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, audit code
_X32_BIT = 0x40000000

_O_ACCMODE, _O_TRUNC = 3, 0o1000
_CLONE_THREAD = 0x00010000
_IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # isatty, bytes waiting, modes of the handle
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # copies and flags of the handle
_PRCTLS = (15, 16, 0x53564D41)  # names of threads and of memory

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = (0x00050000 | code for code in (errno.EPERM, errno.ENOSYS))
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ABI_QUERY = 1
_RULE_PATH_BENEATH = 1
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_GET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 21, 38
_SECCOMP_FILTER = 2
_SIGKILL = 9

# Landlock's rights: run, write, read, remove, make seven kinds of things, and newer ones.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 6, 1 << 7, 1 << 8, 1 << 9
_MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = 1 << 10, 1 << 11, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_HANDLED = (
    _EXECUTE | _WRITE_FILE | _READ_FILE | _READ_DIR | _REMOVE_DIR | _REMOVE_FILE | _MAKE_CHAR
    | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _MAKE_SYM
)  # fmt: skip
_NEWER_RIGHTS = {2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEVICE}  # since which version
_TO_READ = _READ_FILE | _READ_DIR
_IN_SCRATCH = (
    _TO_READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
)
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE  # the others are of folders

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def why_unavailable() -> str | None:
    """Return in a few words why this machine has no sandbox, or None if it has one."""
    if platform.machine() not in _MACHINES:
        return f"there is no system call filter for {platform.machine()}"
    if _landlock_version() < 1:
        return "this Linux kernel has no Landlock"
    if _libc().prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return "this Linux kernel has no seccomp"
    return None


def restrict(scratch: Path, readable: Iterable[Path]) -> None:
    """Restrict this process permanently.  It must have one thread.

    Args:
        scratch: folder where it may write.
        readable: files and folders that it may read; missing ones are ignored.

    Raises:
        OSError: a step failed; no untrusted file may be opened.
    """
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise OSError(errno.EBUSY, f"{len(threads)} threads run already")
    libc = _libc()
    _check(libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "die with the parent")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    _restrict_files(scratch, readable)
    _restrict_calls()


def filter_program(machine: str, *, pid: int) -> list[Instruction]:
    """Build the seccomp filter for ``machine`` and the process ``pid``.

    Raises:
        KeyError: the machine is unknown.
    """
    column, audit_code = _MACHINES[machine]
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),  # the kind of machine that the call is made as
        (_EQUAL, 1, 0, audit_code),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call's number
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
    ]
    bodies = {name: [(_RETURN, 0, 0, _ALLOW)] for name in _ALWAYS}
    bodies |= _checked_calls(pid) | {name: [(_RETURN, 0, 0, _ENOSYS)] for name in _ABSENT}
    for name, numbers in (_ALWAYS | _CHECKED | _ABSENT).items():
        number, body = numbers[column], bodies[name]
        if number is not None:
            program += [(_EQUAL, 0, len(body), number), *body]
    newer = [(_AT_LEAST, 0, 1, _NEWEST_CALL + 1), (_RETURN, 0, 0, _ENOSYS)]
    return program + newer + [(_RETURN, 0, 0, _EPERM)]


def _checked_calls(pid: int) -> dict[str, list[Instruction]]:
    """Return the instructions for calls that depend on their arguments; all end in a return."""
    return {
        "open": _open_body(flags=1),
        "openat": _open_body(flags=2),
        "clone": [
            _load(0),
            (_ANY_BIT, 0, 1, _CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _EPERM),
        ],
        "ioctl": _one_of(_IOCTLS, argument=1),
        "fcntl": _one_of(_FCNTLS, argument=1),
        "prctl": _one_of(_PRCTLS, argument=0),
        "tgkill": _one_of((pid,), argument=0),
        "prlimit64": [  # reading the process's own limits: no process id, no new limit
            *[_load(0), (_EQUAL, 0, 5, 0)],
            *[_load(2), (_EQUAL, 0, 3, 0)],
            *[_load(2, high=True), (_EQUAL, 0, 1, 0)],
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _EPERM),
        ],
    }


def _open_body(*, flags: int) -> list[Instruction]:
    """Refuse truncation without write access, which old versions of Landlock allow."""
    return [
        _load(flags),
        (_AND, 0, 0, _O_ACCMODE | _O_TRUNC),
        (_EQUAL, 2, 0, _O_TRUNC),
        (_EQUAL, 1, 0, _O_TRUNC | _O_ACCMODE),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
    ]


def _one_of(values: tuple[int, ...], *, argument: int) -> list[Instruction]:
    body = [_load(argument)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*body, (_RETURN, 0, 0, _EPERM)]


def _load(argument: int, *, high: bool = False) -> Instruction:
    """Load the low or the high half of a 64-bit argument of the call."""
    return (_LOAD, 0, 0, 16 + 8 * argument + (4 if high else 0))


def _restrict_calls() -> None:
    program = filter_program(platform.machine(), pid=os.getpid())
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fields = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    _check(_libc().prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, fields, 0, 0), "the system call filter")


def _restrict_files(scratch: Path, readable: Iterable[Path]) -> None:
    """Allow writing only in ``scratch``, and reading only there and in ``readable``."""
    libc, version = _libc(), _landlock_version()
    handled = _HANDLED
    for since, right in _NEWER_RIGHTS.items():
        handled |= right if version >= since else 0
    network = 3 if version >= 4 else 0  # bind and connect by TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets and signals
    attributes = struct.pack("=QQQ", handled, network, scoped)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    _check(ruleset, "Landlock's rules")
    try:
        _grant(ruleset, scratch, handled & _IN_SCRATCH)
        for path in readable:
            if path.exists():
                _grant(ruleset, path, _TO_READ)
        _check(libc.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    finally:
        os.close(ruleset)


def _grant(ruleset: int, path: Path, rights: int) -> None:
    """Add a rule: ``rights`` for everything in ``path``, or for this file."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & _FILE_RIGHTS, handle)
        added = _libc().syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
        _check(added, f"Landlock's rule for {path}")
    finally:
        os.close(handle)


def _landlock_version() -> int:
    """Return the version of Landlock, 0 if there is none."""
    return max(0, _libc().syscall(_CREATE_RULESET, None, 0, _ABI_QUERY))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
