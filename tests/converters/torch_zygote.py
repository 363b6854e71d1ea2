"""A process with torch imported that forks one sandboxed reader per file, to save the import.

The forked process runs the very function that the program runs in a fresh interpreter,
``read_confined``.  Two more ways to unpickle serve as controls: ``raw`` enters the sandbox and
then unpickles with no restraint, as a reader that was taken over might; ``armed`` does so without
the sandbox, to show that a hostile pickle would have worked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from mlx_mtp.converters.pytorch.checkpoint import Request
from mlx_mtp.storage.package import package_folder

_SOURCE = """
import dataclasses, io, json, os, pickle, signal, sys, time, types
from pathlib import Path
package = types.ModuleType("mlx_mtp")
package.__path__ = [sys.argv[1]]
sys.modules["mlx_mtp"] = package
import torch, numpy
from mlx_mtp.converters.pytorch import sandbox
from mlx_mtp.converters.pytorch import reader as torch_reader
torch.set_num_threads(1)

class Unpickler(pickle.Unpickler):
    def persistent_load(self, pid):
        return pid

def work(request):
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)
    scratch = Path(request["scratch"])
    limits = sandbox.Limits(**request["limits"])
    path = Path(request["path"])
    os.chdir(scratch)
    if request["way"] == "read":
        torch_reader.read_confined(path, scratch, is_zip=request["is_zip"], limits=limits)
        return
    if request["way"] == "raw":
        sandbox.enter(scratch, readable=[path], limits=limits)
    Unpickler(io.BytesIO(path.read_bytes())).load()

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            work(request)
        except BaseException:
            os._exit(3)
        os._exit(0)
    deadline = time.monotonic() + request["limits"]["wall_s"]
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.002)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status) if done else None), flush=True)
"""


class Zygote:
    """Stands in for ``torch_checkpoint.run_child``."""

    def __init__(self) -> None:
        package = str(package_folder())
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _SOURCE, package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        )
        self.slowest_s = 0.0
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, request: Request, *, way: str = "read") -> int:
        """Serve one request; returns the exit code or raises TimeoutError."""
        fields: dict[str, Any] = {
            "path": str(request.path),
            "scratch": str(request.scratch),
            "is_zip": request.is_zip,
            "limits": vars(request.limits),
            "way": way,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        started = time.monotonic()
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())  # fails if the zygote was killed
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        if code is None:
            raise TimeoutError
        return code

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)
