"""A process with torch imported that forks one sandboxed reader per file, to save the import.

The forked process runs the very function that the program runs in a fresh interpreter,
``read_confined``.  Two more ways to unpickle serve as controls: ``raw`` enters the sandbox and
then unpickles with no restraint, as a reader that was taken over might; ``armed`` does so without
the sandbox, to show that a hostile pickle would have worked.
"""

from __future__ import annotations

import json
import signal
from typing import Any

from mlx_mtp.converters.pytorch.checkpoint import Request
from mlx_mtp.storage.package import package_folder
from tests.helpers.processes import ForkServer

_SOURCE = """
import io, json, os, pickle, sys, types
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

def work(task):
    request = json.loads(task)
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
"""


class Zygote(ForkServer):
    """Stands in for ``torch_checkpoint.run_child``."""

    def __init__(self) -> None:
        env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        super().__init__(_SOURCE, [str(package_folder())], flags=["-I", "-B"], env=env, torch=True)

    def __call__(self, request: Request, *, way: str = "read") -> int:
        """Serve one request; returns the exit code or raises TimeoutError."""
        fields: dict[str, Any] = {
            "path": str(request.path),
            "scratch": str(request.scratch),
            "is_zip": request.is_zip,
            "limits": vars(request.limits),
            "way": way,
        }
        code = self.run(json.dumps(fields), kill_after_s=request.limits.wall_s)
        if code == -signal.SIGKILL:
            raise TimeoutError
        return code
