"""Conversion of PyTorch files to safetensors files; nothing else reads PyTorch files.

A child process with a scrubbed environment imports torch, enters the sandbox and reads the file
with ``weights_only=True`` (``reader``).  This process enforces the time limit, and checks the
child's output as if it had been downloaded.  Without the caller's permission, or on a machine
without a sandbox, the file is refused.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.converters.pytorch import sandbox
from mlx_mtp.converters.pytorch.file_format import recognise_torch_file
from mlx_mtp.converters.pytorch.reader import (
    MAX_TEXT,
    RESULT_FILE,
    TENSORS_FILE,
    max_output_bytes,
)
from mlx_mtp.storage.package import package_folder
from mlx_mtp.storage.safetensors import check_safetensors, read_json_object, shown

_START_S = 180.0  # importing torch from a slow disk; the file has not been opened yet
_BYTES_PER_S = 20e6  # any machine that can run a model is faster
_MIN_FREE_BYTES = 64 << 20
# The package's own __init__ would import MLX and start threads.
_BOOT = """
import sys, types
sys.path.extend(sys.argv[3:])
package = types.ModuleType("mlx_mtp")
package.__path__ = [sys.argv[2]]
sys.modules["mlx_mtp"] = package
from mlx_mtp.converters.pytorch.reader import main
main(sys.argv[1])
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One file for the child process.

    Attributes:
        path: the PyTorch file.
        scratch: private folder for the result.
        is_zip: whether it is a zip archive.
        limits: limits of memory, time and file size.
    """

    path: Path
    scratch: Path
    is_zip: bool
    limits: sandbox.Limits


def torch_to_safetensors(
    path: Path, scratch: Path, *, allow_pickle: bool
) -> tuple[Path, dict[str, Any]]:
    """Read one PyTorch file in a sandbox and write its tensors as safetensors.

    Nested dicts become dotted names; states of optimisers, schedulers and random generators are
    omitted; float64 becomes float32, the widest type that MLX has on all devices.

    Args:
        path: the file, a zip archive or of the form before PyTorch 1.6.
        scratch: folder for the result, which may be up to four times as large as the file.
        allow_pickle: whether the caller permits reading a pickle.

    Returns:
        The new file in ``scratch``, and the plain values by dotted name: text, numbers, true,
        false, None, and short lists of them.

    Raises:
        ValueError: the file is refused or broken, or torch or a sandbox is missing; one line.
    """
    if not allow_pickle:
        raise ValueError(
            f"{path} is a PyTorch pickle file: use --allow-pickle to read it "
            "(weights only, in a sandbox)"
        )
    scratch = scratch.resolve()  # the child has a working directory of its own
    file = recognise_torch_file(path)
    if reason := sandbox.why_unavailable():
        raise ValueError(f"{path} cannot be read in a sandbox and is refused: {reason}")
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f'{path} needs PyTorch to be read: pip install "mlx-mtp[convert]"')
    if shutil.disk_usage(scratch).free < file.num_bytes + _MIN_FREE_BYTES:
        raise ValueError(f"{scratch} has no room for the {file.num_bytes} bytes of {path}")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="read.") as private:
        request = Request(
            path=path.resolve(),
            scratch=Path(private),
            is_zip=file.is_zip,
            limits=limits_for(file.num_bytes),
        )
        values = _serve(request, shown_path=path)
        return _publish(Path(private) / TENSORS_FILE, scratch, path), values


def limits_for(file_bytes: int) -> sandbox.Limits:
    """Return the limits for a file of this size: twice its size in memory plus 1 GiB, and so on."""
    seconds = file_bytes / _BYTES_PER_S
    return sandbox.Limits(
        memory_bytes=2 * file_bytes + (1 << 30),
        cpu_s=int(2 + seconds),
        wall_s=4 + seconds,
        file_bytes=max_output_bytes(file_bytes) + (32 << 20),
    )


def run_child(request: Request) -> int:
    """Run ``read_confined`` in a fresh interpreter.

    Returns:
        Its exit code, or the negative number of the signal that ended it.

    Raises:
        TimeoutError: it exceeded the time limit.
    """
    reader, writer = os.pipe()
    try:
        child = subprocess.Popen(
            _command(request, ready=writer),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=request.scratch,
            env=_environment(request.scratch),
            pass_fds=[writer],
            start_new_session=True,
        )
    finally:
        os.close(writer)
    try:
        _wait_readable(reader, _START_S)  # it is ready, or it has ended
        return child.wait(timeout=request.limits.wall_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    finally:
        os.close(reader)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _command(request: Request, *, ready: int) -> list[str]:
    fields = {
        "path": str(request.path),
        "scratch": str(request.scratch),
        "is_zip": request.is_zip,
        "limits": dataclasses.asdict(request.limits),
        "ready": ready,
    }
    package = package_folder()
    roots = {str(Path(spec.origin).parent.parent) for spec in _specs() if spec.origin}
    return [sys.executable, "-I", "-B", "-c", _BOOT, json.dumps(fields), str(package), *roots]


def _specs() -> list[Any]:
    """Return the locations of torch and numpy, which an isolated interpreter may not find."""
    return [spec for name in ("torch", "numpy") if (spec := importlib.util.find_spec(name))]


def _environment(scratch: Path) -> dict[str, str]:
    """Return the child's environment: no tokens, no proxies, one thread."""
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    places = dict.fromkeys(("HOME", "TMPDIR"), str(scratch))
    fixed = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": ""}
    return inherited | dict.fromkeys(threads, "1") | places | fixed


def _wait_readable(descriptor: int, seconds: float) -> None:
    """Wait until there is something to read, or the other end is closed.

    Raises:
        TimeoutError: neither happened in time.
    """
    deadline = time.monotonic() + seconds
    if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise TimeoutError


def _serve(request: Request, *, shown_path: Path) -> dict[str, Any]:
    """Run the child and return the plain values of the file."""
    try:
        code = run_child(request)
    except TimeoutError:
        raise ValueError(f"{shown_path} is refused: reading it takes too long") from None
    if code != 0:
        raise ValueError(f"{shown_path} cannot be read: {_how_it_ended(code)}")
    result_path = request.scratch / RESULT_FILE
    try:
        _require_own_file(result_path)
        result = read_json_object(result_path)
    except ValueError:
        raise ValueError(f"{shown_path} cannot be read: its reader returned no result") from None
    if result.get("error") is not None:
        raise ValueError(f"{shown_path} cannot be read: {shown(result['error'], limit=300)}")
    values = result.get("values")
    if not isinstance(values, dict):
        raise ValueError(f"{shown_path} cannot be read: its reader returned no result")
    return {name: value for name, value in values.items() if _is_plain(name, value)}


def _publish(tensors: Path, scratch: Path, path: Path) -> Path:
    """Check the child's tensor file and move it into ``scratch``."""
    try:
        _require_own_file(tensors)
        check_safetensors(tensors)
    except ValueError as error:
        reason = str(error).replace(str(tensors), "its tensors")
        raise ValueError(f"{path} cannot be read: {reason}") from None
    target = scratch / f"{path.stem}.safetensors"
    if os.path.lexists(target):
        target = scratch / f"{path.name}.safetensors"
    os.replace(tensors, target)
    return target


def _require_own_file(path: Path) -> None:
    """Refuse a link, which might refer to a file outside the scratch folder."""
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1:
        raise ValueError(f"{path} is not a separate file")


def _is_plain(name: str, value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    kinds = str | int | float | bool | None
    return len(name) <= MAX_TEXT and all(isinstance(item, kinds) for item in items)


def _how_it_ended(code: int) -> str:
    if code == sandbox.MEMORY_EXIT:
        return "it needs too much memory"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "reading it takes too long or too much memory"
    if code < 0:
        return f"its reader was ended by {signal.Signals(-code).name}"
    return f"its reader ended with code {code}"
