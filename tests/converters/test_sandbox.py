"""The sandbox from inside: what must fail fails, what must work works, limits hold."""

from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mtp.converters.pytorch import sandbox, sandbox_linux
from mlx_mtp.storage.package import package_folder

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")

_PRELUDE = """
import ctypes, errno, json, os, resource, signal, socket, subprocess, sys, threading, types
from pathlib import Path
package = types.ModuleType("mlx_mtp")
package.__path__ = [sys.argv[1]]
sys.modules["mlx_mtp"] = package
from mlx_mtp.converters.pytorch import sandbox
scratch, outside = Path(sys.argv[2]), Path(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def enter(**changes):
    usual = dict(memory_bytes=1 << 30, cpu_s=5, wall_s=5.0, file_bytes=1 << 20)
    readable = [outside / "shown"]
    sandbox.enter(scratch, readable=readable, limits=sandbox.Limits(**(usual | changes)))
"""

# Each must fail.  Numbers are those of x86-64, where the call has no name in Python.
_FORBIDDEN = """
open(file, "w") ; open(file, "a") ; open(file, "r+b") ; open(outside / "new", "x")
os.close(os.open(file, os.O_RDONLY | os.O_TRUNC)) ; os.close(os.open(file, 3 | os.O_TRUNC))
os.truncate(file, 0) ; os.unlink(file) ; os.rename(file, outside / "moved")
os.rename(file, scratch / "moved") ; os.rename(scratch / "own", outside / "moved")
os.link(file, scratch / "link") ; os.link(scratch / "own", outside / "link")
os.symlink(file, scratch / "symlink") ; os.symlink(file, outside / "symlink")
os.mkdir(outside / "folder") ; os.rmdir(outside / "empty")
os.mkfifo(outside / "fifo") ; os.mkfifo(scratch / "fifo") ; os.mknod(outside / "node")
os.chmod(file, 0o777) ; os.chmod(scratch / "own", 0o4777) ; os.fchmod(handle, 0o777)
os.chown(file, 1, 1) ; os.fchown(handle, 1, 1) ; os.utime(file, (1, 1))
os.setxattr(file, "user.a", b"b") ; os.removexattr(file, "user.a") ; os.chroot(scratch)
socket.socket() ; socket.socket(socket.AF_INET, socket.SOCK_DGRAM) ; socket.socket(socket.AF_UNIX)
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) ; socket.socketpair()
socket.create_connection(("127.0.0.1", 9), 1) ; socket.getaddrinfo("localhost.invalid", 80)
os.fork() ; os.forkpty() ; os.system("true") and 1 / 0 ; subprocess.run(["true"]) ; os.popen("true")
os.execv("/bin/true", ["true"]) ; os.posix_spawn("/bin/true", ["true"], {})
os.kill(os.getppid(), 0) ; os.kill(1, 0) ; os.killpg(0, 0) ; os.setsid() ; os.nice(1)
os.sched_setaffinity(0, {0}) ; os.setuid(1) ; os.setgroups([]) ; call(272, 0x10000000)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1)) ; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))
resource.prlimit(os.getppid(), resource.RLIMIT_CORE) ; resource.prlimit(0, 0, (9, 9))
open("/proc/self/mem", "r+b") ; open(f"/proc/{os.getppid()}/environ", "rb").read()
open(f"/proc/{os.getppid()}/mem", "rb").read(1) ; open("/dev/shm/a", "w") ; open("/dev/null", "w")
ioctl(handle, 0x5412, b"x") ; fcntl(handle, 8, os.getppid()) ; os.memfd_create("a")
call(58) ; call(57) ; call(435, 0, 0) ; call(56, 17, 0) ; call(62, os.getpid(), 0)
call(101, 16, os.getppid(), 0, 0) ; call(101, 0, 0, 0, 0) ; call(310, os.getppid(), 0, 0, 0, 0, 0)
call(434, os.getppid(), 0) ; call(424, 3, 9, 0, 0) ; call(234, os.getppid(), os.getppid(), 0)
call(200, os.getppid(), 0) ; call(129, os.getppid(), 10, 0) ; call(297, 1, 1, 10, 0)
call(425, 8, 0) ; call(426, 0, 0, 0, 0, 0, 0) ; call(321, 0, 0, 0) ; call(298, 0, 0, 0, 0, 0)
call(165, 0, 0, 0, 0, 0) ; call(166, 0, 0) ; call(428, 0, 0, 0) ; call(429, 0, 0, 0, 0, 0)
call(250, 0, 0, 0, 0, 0) ; call(248, 0, 0, 0, 0, 0) ; call(303, 0, 0, 0, 0, 0) ; call(304, 0, 0, 0)
call(323, 0) ; call(308, 0, 0) ; call(155, 0, 0) ; call(313, 0, 0, 0)
call(175, 0, 0, 0)
call(29, 0, 4096, 0o1600) ; call(240, b"a", 0o102, 0o600, 0) ; call(437, -100, b"a", 0, 24)
call(452, -100, b"a", 0o777, 0) ; call(41, 2, 1, 0) ; call(49, 3, 0, 0)
call(44, 1, 0, 0, 0, 0, 0)
call(157, 4, 1, 0, 0, 0) ; call(59, b"/bin/true", 0, 0) ; call(322, -100, b"/bin/true", 0, 0, 0)
call(76, bytes(file), 0) ; call(9999) ; file.read_bytes() ; os.listdir("/") ; os.listdir(outside)
open("/etc/passwd").read() ; open("/proc/self/environ").read() ; open("/proc/1/cmdline").read()
(outside / "shown").write_text("x") ; (outside / "shown").unlink()
"""

_ALLOWED = """
(scratch / "new").write_bytes(b"x" * 5000) ; (scratch / "new").rename(scratch / "newer")
(scratch / "newer").unlink() ; (scratch / "folder").mkdir() ; (scratch / "folder").rmdir()
(outside / "shown").read_bytes() ; os.stat(file) ; __import__("colorsys") ; os.stat("/etc/passwd")
bytearray(64 << 20) ; run_thread() ; json.dumps([1]) ; os.urandom(8) ; os.getpid()
resource.getrlimit(resource.RLIMIT_AS)
"""


def _run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    scratch, outside = tmp_path / "scratch", tmp_path / "outside"
    for folder in (scratch, outside):
        folder.mkdir(exist_ok=True)
    package = str(package_folder())
    command = [sys.executable, "-I", "-B", "-c", _PRELUDE + code, package, str(scratch)]
    return subprocess.run([*command, str(outside)], capture_output=True, text=True, timeout=60)


def _try_all(acts: str, tmp_path: Path) -> dict[str, str]:
    """Try each act in one sandboxed process; returns how each ended."""
    code = f"""
from fcntl import fcntl, ioctl
file = outside / "file"
(outside / "empty").mkdir()
file.write_text("precious")
(outside / "shown").write_text("shown")
(scratch / "own").write_text("own")
handle = os.open(file, os.O_RDONLY)

def run_thread():
    thread = threading.Thread(target=list)
    thread.start()
    thread.join()

enter()
outcome = {{}}
for act in {[act.strip() for line in acts.splitlines() for act in line.split(" ; ") if act]!r}:
    try:
        eval(act)
        outcome[act] = "worked"
    except OSError as error:
        outcome[act] = errno.errorcode.get(error.errno, "no number")
    except (ZeroDivisionError, ValueError):  # os.system's result, and setrlimit's way to say it
        outcome[act] = "EPERM"
print(json.dumps(outcome))
"""
    done = _run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_what_a_reader_must_not_do_fails(tmp_path: Path) -> None:
    outcome = _try_all(_FORBIDDEN, tmp_path)
    assert len(outcome) > 100
    # A name that cannot be looked up ends in an error of its own, without a number of errno.
    fine = {"EPERM", "EACCES", "ENOSYS", "EXDEV", "no number"}
    assert {act: end for act, end in outcome.items() if end not in fine} == {}
    assert (tmp_path / "outside" / "file").read_text() == "precious"
    assert sorted(p.name for p in (tmp_path / "outside").iterdir()) == [*("empty", "file", "shown")]
    assert sorted(p.name for p in (tmp_path / "scratch").iterdir()) == ["own"]


@linux_only
def test_what_a_reader_needs_works(tmp_path: Path) -> None:
    outcome = _try_all(_ALLOWED, tmp_path)
    assert set(outcome.values()) == {"worked"}, outcome


@linux_only
def test_memory_file_size_and_cores_are_limited(tmp_path: Path) -> None:
    done = _run(
        """
enter(memory_bytes=100 << 20)
try:
    bytearray(200 << 20)
except MemoryError:
    print("memory")
try:
    (scratch / "long").write_bytes(b"x" * (2 << 20))
except OSError as error:
    print(errno.errorcode[error.errno])
print(resource.getrlimit(resource.RLIMIT_CORE))
handles = []
try:
    while True:
        handles.append(os.open(scratch, os.O_RDONLY))
except OSError as error:
    print(errno.errorcode[error.errno], len(handles) < 64)
""",
        tmp_path,
    )
    assert done.stdout.split("\n")[:4] == ["memory", "EFBIG", "(0, 0)", "EMFILE True"], done.stderr
    assert (tmp_path / "scratch" / "long").stat().st_size <= 1 << 20


@linux_only
def test_time_is_limited(tmp_path: Path) -> None:
    done = _run("enter(cpu_s=0)\nwhile True: pass", tmp_path)
    assert -done.returncode in (signal.SIGXCPU, signal.SIGKILL)


@linux_only
def test_entering_with_a_second_thread_is_refused(tmp_path: Path) -> None:
    """Landlock would bind the calling thread alone."""
    done = _run(
        """
threading.Thread(target=threading.Event().wait, daemon=True).start()
try:
    enter()
except OSError as error:
    print(error.strerror)
""",
        tmp_path,
    )
    assert done.stdout == "2 threads run already\n", done.stderr


@linux_only
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("_restrict_files", "write outside the scratch folder"),
        ("_restrict_calls", "reach the network"),
    ],
)
def test_a_sandbox_with_a_hole_is_noticed(tmp_path: Path, broken: str, said: str) -> None:
    done = _run(
        f"""
from mlx_mtp.converters.pytorch import sandbox_linux
sandbox_linux.{broken} = lambda *_: None
try:
    enter()
except OSError as error:
    print(error)
""",
        tmp_path,
    )
    assert done.stdout == f"the sandbox let the process {said}\n", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "scratch"]


def test_the_memory_watch_ends_the_process(tmp_path: Path) -> None:
    """Measured by the pages of this program: Linux passes a parent's peak on to its children."""
    done = _run(
        """
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

if sys.platform == "linux":
    sandbox._peak_bytes = resident
sandbox.watch_memory(sandbox._peak_bytes() + (50 << 20))
held = b"x" * (100 << 20)
threading.Event().wait(20)
""",
        tmp_path,
    )
    assert done.returncode == sandbox.MEMORY_EXIT, done.stderr


def test_machines_without_a_sandbox_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "sunos5")
    assert sandbox.why_unavailable() == "sunos5 has neither Landlock nor sandbox-exec"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert sandbox.why_unavailable() == "there is no system call filter for riscv64"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sandbox_linux, "_landlock_version", lambda: 0)
    assert sandbox.why_unavailable() == "this Linux kernel has no Landlock"


# macOS: the profile's text


def test_the_macos_profile_denies_all_but_reading_and_the_scratch_folder() -> None:
    profile = sandbox.macos_profile(Path("/private/tmp/a b"))
    assert profile.splitlines()[:2] == ["(version 1)", "(deny default)"]
    rules = re.findall(r"\(allow ([a-z-]+\*?)", profile)
    assert rules == ["file-read*", "sysctl-read", "signal", "file-write*"]
    assert '(allow file-write* (subpath "/private/tmp/a b"))' in profile
    assert profile.count("(") == profile.count(")")


def test_the_macos_profile_cannot_be_broken_out_of() -> None:
    hostile = Path('/tmp/a")) (allow default) (x "\\')
    line = sandbox.macos_profile(hostile).splitlines()[-1]
    text = re.fullmatch(r'\(allow file-write\* \(subpath "(.*)"\)\)', line)
    assert text is not None
    assert re.fullmatch(r'(?:[^"\\]|\\["\\])*', text[1])  # no quote that is not escaped
    assert text[1].replace('\\"', '"').replace("\\\\", "\\") == str(hostile)
    for path in ("relative", "/a\nb"):
        with pytest.raises(ValueError, match="cannot be a scratch folder"):
            sandbox.macos_profile(Path(path))


# The system call filter, run by a small interpreter, for machines that are not here too

_CODES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _decide(machine: str, number: int, *arguments: int, code: int | None = None) -> str:
    words = [number, _CODES[machine] if code is None else code, 0, 0]
    for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]:
        words += [argument & 0xFFFFFFFF, argument >> 32]
    program, at, value = sandbox_linux.filter_program(machine, pid=77), 0, 0
    while True:
        opcode, if_true, if_false, operand = program[at]
        at += 1
        if opcode == 0x20:
            value = words[operand // 4]
        elif opcode == 0x54:
            value &= operand
        elif opcode == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x50001: "EPERM", 0x50026: "ENOSYS"}[
                operand
            ]
        else:
            test = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}
            at += if_true if test[opcode] else if_false


@pytest.mark.parametrize(
    ("machine", "name", "number", "arguments", "decision"),
    [
        (machine, name, number, arguments, decision)
        for name, x86, arm, arguments, decision in [
            ("read", 0, 63, (), "allow"),
            ("exit_group", 231, 94, (), "allow"),
            ("openat", 257, 56, (0, 0, 0o2000000), "allow"),
            ("openat, write and cut", 257, 56, (0, 0, 0o1101), "allow"),
            ("openat, cut", 257, 56, (0, 0, 0o1000), "EPERM"),
            ("openat, cut without access", 257, 56, (0, 0, 0o1003), "EPERM"),
            ("clone a thread", 56, 220, (0x3D0F00,), "allow"),
            ("clone a process", 56, 220, (0x1200011,), "EPERM"),
            ("clone3", 435, 435, (), "ENOSYS"),
            ("openat2", 437, 437, (), "ENOSYS"),
            ("tgkill oneself", 234, 131, (77,), "allow"),
            ("tgkill another", 234, 131, (78,), "EPERM"),
            ("prlimit64, look", 302, 261, (0, 7, 0), "allow"),
            ("prlimit64, set", 302, 261, (0, 7, 1), "EPERM"),
            ("prlimit64, set by a high address", 302, 261, (0, 7, 1 << 40), "EPERM"),
            ("prlimit64, another", 302, 261, (5, 7, 0), "EPERM"),
            ("ioctl TCGETS", 16, 29, (0, 0x5401), "allow"),
            ("ioctl TIOCSTI", 16, 29, (0, 0x5412), "EPERM"),
            ("fcntl F_SETOWN", 72, 25, (0, 8), "EPERM"),
            ("prctl PR_SET_NAME", 157, 167, (15,), "allow"),
            ("prctl PR_SET_DUMPABLE", 157, 167, (4,), "EPERM"),
            ("socket", 41, 198, (), "EPERM"),
            ("connect", 42, 203, (), "EPERM"),
            ("execve", 59, 221, (), "EPERM"),
            ("kill", 62, 129, (), "EPERM"),
            ("ptrace", 101, 117, (), "EPERM"),
            ("fchmodat", 268, 53, (), "EPERM"),
            ("io_uring_setup", 425, 425, (), "EPERM"),
            ("a later call", 500, 500, (), "ENOSYS"),
        ]
        for machine, number in (("x86_64", x86), ("aarch64", arm))
    ],
)
def test_the_filter_decides_by_call_and_argument(
    machine: str, name: str, number: int, arguments: tuple[int, ...], decision: str
) -> None:
    assert _decide(machine, number, *arguments) == decision, name


def test_the_filter_kills_calls_made_as_another_machine() -> None:
    assert _decide("x86_64", 0, code=0x40000003) == "kill"  # 32-bit calls have other numbers
    assert _decide("x86_64", 0x40000000) == "kill"
    assert _decide("aarch64", 63, code=_CODES["x86_64"]) == "kill"


@linux_only
@pytest.mark.parametrize(
    ("column", "header"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        (1, "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_are_those_of_the_kernels_headers(column: int, header: str) -> None:
    if not Path(header).is_file():
        pytest.skip("the kernel's headers are not installed")
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    defined["newfstatat"] = defined.get("newfstatat", defined.get("fstatat"))
    calls = sandbox_linux._ALWAYS | sandbox_linux._CHECKED | sandbox_linux._ABSENT
    for name, numbers in calls.items():
        if numbers[column] is not None:
            assert str(numbers[column]) == defined[name], name
