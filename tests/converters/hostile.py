"""Hostile pickles, built byte by byte; each would leave a canary file behind if it were obeyed.

A plain unpickler obeys every one of them, which a test shows first.
"""

from __future__ import annotations

import io
import marshal
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
VERSION = pickle.dumps(1001, protocol=2)
MACHINE = pickle.dumps({"little_endian": True, "protocol_version": 1001}, protocol=2)
KEYS = pickle.dumps(["0"], protocol=2)


class Raw(bytes):
    """Instructions that leave one object on the stack."""


def push(value: Any) -> Raw:
    """Instructions for a value."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, tuple):
        return Raw(b"(" + b"".join(push(item) for item in value) + b"t")
    if isinstance(value, list):
        return Raw(b"](" + b"".join(push(item) for item in value) + b"e")
    if isinstance(value, dict):
        pairs = b"".join(push(k) + push(v) for k, v in value.items())
        return Raw(b"}(" + pairs + b"u")
    if isinstance(value, Path):
        value = str(value)
    return Raw(pickletools.optimize(pickle.dumps(value, protocol=3))[2:-1])  # without memo


def named(module: str, name: str) -> Raw:
    """A global by its two names."""
    return Raw(f"c{module}\n{name}\n".encode())


def stacked(module: str, name: str) -> Raw:
    """A global by STACK_GLOBAL, which also follows dots in the name."""
    return Raw(push(module) + push(name) + b"\x93")


def call(function: Raw, *arguments: Any) -> Raw:
    """A call by REDUCE."""
    return Raw(function + push(tuple(arguments)) + b"R")


def method(target: Raw, name: str, *arguments: Any) -> Raw:
    """A method call through ``getattr``."""
    return call(call(named("builtins", "getattr"), target, name), *arguments)


def finish(body: bytes, *, protocol: int = 2) -> bytes:
    """A whole pickle: a state dict with the object in it."""
    return b"\x80" + bytes([protocol]) + push({"weight": Raw(body)}) + b"."


def weapons(canary: Path, folder: Path) -> dict[str, bytes]:
    """Pickles that make ``canary``, by name.

    Args:
        canary: the file that must not appear.
        folder: where they find what they need.
    """
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    script = folder / "script.py"
    script.write_text(code)
    precious = folder / "precious"
    precious.write_text("x")
    inner = folder / "inner.pt"
    inner.write_bytes(legacy(finish(call(named("os", "system"), shell))))
    return {name: finish(body) for name, body in _calls(canary, shell, code, folder).items()} | {
        "protocol 0 text": b"cos\nsystem\n(S'" + shell.encode() + b"'\ntR.",
        "protocol 4 frame": pickle.dumps({}, protocol=4)[:2] + finish(
            call(stacked("posix", "system"), shell)
        )[2:],
        "INST": finish(b"(S'" + shell.encode() + b"'\nios\nsystem\n"),
        "OBJ": finish(b"(" + named("os", "system") + push(shell) + b"o"),
        "STACK_GLOBAL": finish(call(stacked("os", "system"), shell)),
        "STACK_GLOBAL with dots": finish(
            call(stacked("pathlib", "Path.touch"), call(named("pathlib", "Path"), canary)),
            protocol=4,
        ),
        "STACK_GLOBAL from the memo": finish(
            push("os") + b"q\x010" + push("system") + b"q\x020"
            + b"h\x01h\x02\x93" + push((shell,)) + b"R"
        ),
        "NEWOBJ": finish(named("functools", "partial") + push((named("os", "system"), shell))
                         + b"\x81" + b")R"),
        "NEWOBJ_EX": finish(named("functools", "partial") + push((named("os", "system"), shell))
                            + b"}\x92" + b")R"),
        "BUILD calls __setstate__": finish(
            call(
                Raw(
                    call(named("functools", "partial"), named("builtins", "print"))
                    + push((named("os", "system"), (shell,), {}, {})) + b"b"
                )
            )
        ),
        "the call at the key": b"\x80\x02}" + call(named("os", "system"), shell) + push(1) + b"s.",
        "the call before the dict": b"\x80\x02" + call(named("os", "system"), shell) + b"0}.",
        "the call after the dict": b"\x80\x02}" + call(named("os", "system"), shell) + b"0.",
        "behind a mark that is dropped": finish(
            b"(" + call(named("os", "system"), shell) + b"1" + push(1)
        ),
        "in the persistent id": finish(
            push(("storage", call(named("os", "system"), shell), "0", "cpu", 1)) + b"Q"
        ),
        "in a tensor's hooks": finish(
            call(
                named("torch._utils", "_rebuild_tensor_v2"),
                Raw(push(("storage", named("torch", "FloatStorage"), "0", "cpu", 1)) + b"Q"),
                0, (1,), (1,), False, call(named("os", "system"), shell),
            )
        ),
    }  # fmt: skip


def legacy(body: bytes, *, keys: bytes = KEYS, tail: bytes = b"") -> bytes:
    """The form from before version 1.6 around a pickle."""
    return MAGIC + VERSION + MACHINE + body + keys + tail


def zipped(body: bytes, records: dict[str, bytes] | None = None, *, folder: str = "a") -> bytes:
    """A zip archive as torch writes it around a pickle, with one storage of eight bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        members = {"data.pkl": body, "byteorder": b"little", "version": b"3\n", "data/0": bytes(8)}
        for name, content in (members | (records or {})).items():
            archive.writestr(f"{folder}/{name}", content)
    return stream.getvalue()


def _calls(canary: Path, shell: str, code: str, folder: Path) -> dict[str, Raw]:
    """Instructions that run ``shell``, run ``code`` or make ``canary`` some other way."""
    words = ["/usr/bin/touch", str(canary)]
    os_module = call(named("importlib", "import_module"), "os")
    system, imported = named("os", "system"), call(named("builtins", "__import__"), "os")
    compiled = marshal.dumps(compile(code, "x", "exec"))
    inner = finish(call(named("os", "system"), shell))
    load = named("torch.serialization", "load")
    return {
        "os.system": call(named("os", "system"), shell),
        "posix.system": call(named("posix", "system"), shell),
        "os.popen": method(call(named("os", "popen"), shell), "read"),
        "os.spawnv": call(named("os", "spawnv"), 0, words[0], words),
        "os.posix_spawn": method(
            os_module, "waitpid", call(named("os", "posix_spawn"), words[0], words, {}), 0
        ),
        "os.execv": call(named("os", "execv"), words[0], words),
        "os.open": call(named("os", "open"), canary, 0o101),
        "os.mkdir": call(named("os", "mkdir"), canary),
        "os.mkfifo": call(named("os", "mkfifo"), canary),
        "os.symlink": call(named("os", "symlink"), "/etc/passwd", canary),
        "os.link": call(named("os", "link"), folder / "precious", canary),
        "os.rename": call(named("os", "rename"), folder / "precious", canary),
        "builtins.eval": call(named("builtins", "eval"), code),
        "__builtin__.eval": call(named("__builtin__", "eval"), code),
        "builtins.exec": call(named("builtins", "exec"), code),
        "builtins.open": call(named("builtins", "open"), canary, "w"),
        "__import__ and getattr": method(imported, "system", shell),
        "importlib.import_module": method(os_module, "system", shell),
        "map and list": call(
            named("builtins", "list"), call(named("builtins", "map"), system, [shell])
        ),
        "io.open": call(named("io", "open"), canary, "w"),
        "_io.FileIO": call(named("_io", "FileIO"), canary, "w"),
        "codecs.open": call(named("codecs", "open"), canary, "w"),
        "subprocess.call": call(named("subprocess", "call"), words),
        "subprocess.check_output": call(named("subprocess", "check_output"), words),
        "subprocess.getoutput": call(named("subprocess", "getoutput"), shell),
        "subprocess.Popen": method(call(named("subprocess", "Popen"), words), "wait"),
        "runpy.run_path": call(named("runpy", "run_path"), folder / "script.py"),
        "runpy._run_code": call(
            named("runpy", "_run_code"), call(named("builtins", "compile"), code, "x", "exec"), {}
        ),
        "pathlib touch": method(call(named("pathlib", "PosixPath"), canary), "touch"),
        "pathlib write_text": method(call(named("pathlib", "Path"), canary), "write_text", "x"),
        "ctypes": method(call(named("ctypes", "CDLL"), None), "system", shell.encode()),
        "pty.spawn": call(named("pty", "spawn"), words),
        "code.interact": method(
            call(named("code", "InteractiveInterpreter")), "runsource", code
        ),
        "timeit": call(
            named("timeit", "timeit"), code, "pass", named("time", "perf_counter"), 1
        ),
        "cProfile": call(named("cProfile", "run"), code, str(folder / "profile")),
        "bdb": method(call(named("bdb", "Bdb")), "run", code),
        "operator.methodcaller": call(
            call(named("operator", "methodcaller"), "system", shell), os_module
        ),
        "operator.attrgetter": call(
            call(call(named("operator", "attrgetter"), "system"), os_module), shell
        ),
        "functools.reduce": call(
            call(
                named("functools", "reduce"), named("builtins", "getattr"), ["touch"],
                call(named("pathlib", "Path"), canary),
            )
        ),
        "functools.partial": call(call(named("functools", "partial"), system, shell)),
        "copyreg.__newobj__": call(
            call(
                named("copyreg", "__newobj__"), named("functools", "partial"),
                named("os", "system"), shell,
            )
        ),
        "pickle.loads": call(named("pickle", "loads"), inner),
        "_pickle.loads": call(named("_pickle", "loads"), inner),
        "marshal and exec": call(
            named("builtins", "exec"), call(named("marshal", "loads"), compiled)
        ),
        "types.FunctionType": call(
            call(
                named("types", "FunctionType"), call(named("marshal", "loads"), compiled),
                {"open": named("builtins", "open")},
            )
        ),
        "logging.FileHandler": call(named("logging", "FileHandler"), canary),
        "shutil.copy": call(named("shutil", "copy"), folder / "precious", canary),
        "shutil.move": call(named("shutil", "move"), folder / "precious", canary),
        "zipfile": call(named("zipfile", "ZipFile"), canary, "w"),
        "tarfile": call(named("tarfile", "open"), canary, "w"),
        "sqlite3": method(
            call(named("sqlite3", "connect"), canary), "execute", "create table a (b)"
        ),
        "urllib": call(
            named("urllib.request", "urlretrieve"), f"file://{folder}/precious", canary
        ),
        "numpy.savetxt": call(named("numpy", "savetxt"), canary, [1]),
        "numpy.memmap": call(named("numpy", "memmap"), canary, "uint8", "w+", 0, 8),
        "numpy tofile": method(call(named("numpy", "zeros"), 3), "tofile", canary),
        "torch.save": call(named("torch", "save"), {}, canary),
        "torch.from_file": call(named("torch", "from_file"), canary, True, 8),
        "torch storage from_file": call(
            call(named("builtins", "getattr"), named("torch", "UntypedStorage"), "from_file"),
            canary, True, 8,
        ),
        "torch.storage._load_from_bytes": call(
            named("torch.storage", "_load_from_bytes"), (folder / "inner.pt").read_bytes()
        ),
        "torch.load": call(
            Raw(
                call(named("functools", "partial"), named("builtins", "print"))
                + push((load, (str(folder / "inner.pt"),), {"weights_only": False}, {})) + b"b"
            )
        ),
        "torch.utils.collect_env.run": call(named("torch.utils.collect_env", "run"), shell),
    }  # fmt: skip
