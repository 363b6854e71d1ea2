"""A kernel's text compiled for a GPU, with what it takes there; kept by all that made it."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from ..capture import KernelText
from ..errors import MslError
from ..toolchain import cache_folder
from . import nvrtc
from .translate import CudaUnit, translate

ARCH = "sm_90"
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a kernel takes, as the assembler tells it.

    Attributes:
        registers: of a thread.
        stack_bytes: local memory of a thread, which lies in the GPU's own.
        spilled_bytes: of it, stored for want of registers.
        shared_bytes: of a block.
    """

    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Built:
    """A cubin, what it was made from, and what the compiler said."""

    unit: CudaUnit
    cubin: bytes
    resources: Resources
    warnings: tuple[str, ...]


def read_resources(log: str) -> Resources:
    """What the assembler says of the one kernel of a unit.

    Raises:
        MslError: it says nothing, or speaks of several.
    """
    stack, registers, shared = (pattern.findall(log) for pattern in (STACK, REGISTERS, SHARED))
    if len(stack) != 1 or len(registers) != 1 or len(shared) > 1:
        raise MslError(f"the assembler's log is not that of one kernel: {log[:500]}")
    frame, stores, _ = (int(each) for each in stack[0])
    return Resources(
        registers=int(registers[0]),
        stack_bytes=frame,
        spilled_bytes=stores,
        shared_bytes=int(shared[0]) if shared else 0,
    )


def read_warnings(log: str) -> tuple[str, ...]:
    """The lines in which the compiler or the assembler warns."""
    return tuple(line for line in log.splitlines() if "warning" in line.lower())


def build(text: KernelText, *, arch: str = ARCH) -> Built:
    """Translate and compile, or take from the cache.

    Raises:
        MslError: NVRTC is missing, or the text does not compile.
    """
    unit = translate(text)
    path = cache_folder() / f"cuda-{_key(unit.source, arch)}.cubin"
    said = path.with_suffix(".log")
    if not said.exists():
        cubin, log = nvrtc.compile_cubin(unit.source, arch=arch)
        _keep(path, cubin)
        _keep(said, log.encode())
    log = said.read_text()
    return Built(unit, path.read_bytes(), read_resources(log), read_warnings(log))


def _key(source: str, arch: str) -> str:
    headers = [nvrtc.INCLUDE, nvrtc.INCLUDE.parent.parent / "include"]
    texts = [path.read_text() for folder in headers for path in sorted(folder.iterdir())]
    flags = [flag for flag in nvrtc.FLAGS if not flag.startswith("-I")]
    parts = [source, arch, nvrtc.version(), *flags, *texts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _keep(path: Path, data: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    beside.write_bytes(data)
    beside.rename(path)
