"""`Kernel`: one Metal kernel, compiled for the CPU, called like a launch on the GPU.

    k = Kernel(source, "add", mode="check")
    report = k(grid=(1024, 1, 1), threadgroup=(128, 1, 1), buffers={0: x, 1: y}, uninit=(1,))

`source` is complete Metal text.  Buffers are numpy arrays (bfloat16 as uint16 bits, see arrays.py)
or numpy scalars; what a pointer that is not const points to is written in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import native
from .compiler import Program, build
from .errors import MslError
from .signature import Kind, Parameter
from .symbols import source_places

WARNINGS = ("SAME-VALUE", "PARTIAL")
STACK_BYTES = {"fast": 128 << 10, "check": 128 << 10, "check0": 256 << 10, "count": 128 << 10}
ORDERS = {"butterfly": 0, "ascending": 1, "descending": 2}


@dataclass(frozen=True)
class BufferCounts:
    """Bytes of one buffer: loaded by all lanes; distinct within each threadgroup, summed (what a
    perfect cache per threadgroup would fetch); distinct over the launch; stored."""

    loaded: int
    per_threadgroup: int
    distinct: int
    stored: int


@dataclass(frozen=True)
class Counts:
    """What a launch did (mode count); instructions by kind are an estimate, see the README."""

    buffers: dict[int, BufferCounts]
    threadgroup_loaded: int
    threadgroup_stored: int
    private_loaded: int
    private_stored: int
    instructions: dict[str, int]


@dataclass(frozen=True)
class Report:
    """Errors and warnings start with a detector's name and end with the kernel's line."""

    threads: int
    barriers: int  # threadgroup barriers, one for each time a threadgroup passes one
    collectives: dict[str, int]  # simdgroup and quadgroup operations by name, once a group
    threadgroup_bytes: int  # the largest threadgroup's
    accesses: int = 0  # loads and stores checked (mode check)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: Counts | None = None

    @property
    def matrix_multiplies(self) -> int:
        return self.collectives.get("simdgroup_multiply_accumulate", 0)


class _Buffer:
    """A copy of an array of exactly its size, between guards; copied back when it was written."""

    def __init__(self, parameter: Parameter, value: np.ndarray | np.generic) -> None:
        if not isinstance(value, (np.ndarray, np.generic)):
            raise TypeError(f"buffer({parameter.index}) must be a numpy array or scalar")
        self.parameter, self.array = parameter, value
        data = np.ascontiguousarray(value)
        self.bytes = data.nbytes
        self.address = native.runtime().msl_host_alloc(self.bytes)
        ctypes.memmove(self.address, data.ctypes.data, self.bytes)

    def copy_back(self) -> None:
        if not self.parameter.is_writable or not isinstance(self.array, np.ndarray):
            return
        result = np.empty(self.array.shape, self.array.dtype)
        ctypes.memmove(result.ctypes.data, self.address, self.bytes)
        self.array[...] = result

    def free(self) -> None:
        native.runtime().msl_host_free(self.address, self.bytes)


class Kernel:
    """mode: `fast` (-O2), `check` (-O1, every access checked), `check0` (-O0: also sees loads that
    an optimiser deletes), `count`.  Raises MslError where the text does not compile."""

    def __init__(
        self,
        source: str,
        name: str,
        template_args: str = "",
        *,
        mode: str = "fast",
        defines: Sequence[str] = (),
        include: Sequence[str | Path] = (),
    ) -> None:
        native.runtime()  # before the kernel, which leaves its symbols open
        self.name, self.mode = name, mode
        self.program: Program = build(
            source, name, template_args, mode=mode, defines=defines, include=include
        )
        self.parameters = self.program.signature.parameters
        self._library = ctypes.CDLL(str(self.program.library))
        self._entry = ctypes.cast(self._library.msl_entry, ctypes.c_void_p)

    def __call__(
        self,
        grid: Sequence[int],
        threadgroup: Sequence[int],
        buffers: Mapping[int, np.ndarray | np.generic],
        *,
        uninit: Sequence[int] = (),
        constants: Mapping[int, np.generic] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        seed: int = 0,
        preempt: bool = False,
        strict: bool = True,
        workers: int = 1,
        tg_limit: int = 32768,
        max_threads: int = 1024,
        sum_order: str = "butterfly",
        raise_on_error: bool = True,
    ) -> Report:
        """One launch of grid threads in threadgroups.

        uninit: buffers that hold no data yet (reading them first is an error in mode check);
        constants: function constants by id; threadgroup_memory: bytes of threadgroup arguments;
        seed: 0 for a fixed order, else for a random one; preempt: switch lanes between any two
        accesses (mode check); strict: stop where lanes of a simdgroup part; workers: host threads
        (mode fast).  Raises MslError where there are errors, if asked to."""
        runtime = native.runtime()
        runtime.msl_host_reset()
        self._set(constants or {}, threadgroup_memory or {})
        with ExitStack() as stack:
            held = self._hold(buffers, uninit, stack)
            launch = self._launch(grid, threadgroup, held)
            launch.seed, launch.preempt, launch.strict = seed, preempt, strict
            launch.workers, launch.threadgroup_limit = workers, tg_limit
            launch.max_threads = min(max_threads, self.program.signature.max_threads or 1024)
            launch.sum_order = ORDERS[sum_order]
            report = self._report(runtime.msl_host_run(ctypes.byref(launch)), held)
        if report.errors and raise_on_error:
            raise MslError("\n".join(report.errors))
        return report

    def _set(self, constants: Mapping, threadgroup_memory: Mapping[int, int]) -> None:
        for number, value in constants.items():
            data = np.ascontiguousarray(value)
            self._library.msl_set_constant(number, ctypes.c_void_p(data.ctypes.data))
        for parameter in self.parameters:
            if parameter.kind == Kind.THREADGROUP:
                size = threadgroup_memory[parameter.index]
                native.runtime().msl_host_threadgroup_argument(parameter.index, size)

    def _hold(self, buffers, uninit, stack: ExitStack) -> list[_Buffer]:
        held = []
        for parameter in self.parameters:
            if parameter.kind != Kind.BUFFER:
                continue
            if parameter.index not in buffers:
                if parameter.is_pointer:  # an optional argument, which the kernel must not touch
                    continue
                raise MslError(f"buffer({parameter.index}) '{parameter.name}' is not given")
            buffer = _Buffer(parameter, buffers[parameter.index])
            stack.callback(buffer.free)
            initialised = parameter.index not in uninit
            native.runtime().msl_host_region(
                parameter.index,
                buffer.address,
                buffer.bytes,
                parameter.is_writable,
                initialised,
                native.MODES[self.mode],
                parameter.name.encode(),
            )
            held.append(buffer)
        return held

    def _launch(self, grid, threadgroup, held: list[_Buffer]) -> native.Launch:
        launch = native.Launch()
        self._pointers = (ctypes.c_void_p * 32)()
        for buffer in held:
            self._pointers[buffer.parameter.index] = buffer.address
        launch.args = ctypes.addressof(self._pointers)
        launch.entry = self._entry.value
        threads = [min(size, limit) for size, limit in zip(threadgroup, grid, strict=True)]
        launch.grid, launch.threads = (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*threads)
        launch.mode = native.MODES[self.mode]
        launch.stack_bytes = STACK_BYTES[self.mode]
        if self.mode == "count":
            launch.counts_live = ctypes.addressof(self._symbol(ctypes.c_void_p, "msl_blocks_live"))
            launch.counts = ctypes.addressof(self._blocks())
            launch.counts_sink = ctypes.addressof(self._symbol(ctypes.c_uint64, "msl_blocks_sink"))
            ctypes.memset(launch.counts, 0, 8 * len(self.program.blocks))
        return launch

    def _symbol(self, kind, name: str):
        return kind.in_dll(self._library, name)

    def _blocks(self):
        return self._symbol(ctypes.c_uint64 * len(self.program.blocks), "msl_blocks")

    def _report(self, num_errors: int, held: list[_Buffer]) -> Report:
        runtime = native.runtime()
        for buffer in held:
            buffer.copy_back()
        base = runtime.msl_host_base(self._entry)
        found = [native.named_value(runtime.msl_host_error, i) for i in range(num_errors)]
        places = source_places(self.program.library, [pc for _, pc in found if pc], base)
        messages = [text + places.get(pc, "") for text, pc in found]
        totals = native.values(runtime.msl_host_totals, 11)
        names = [native.named_value(runtime.msl_host_collective, i) for i in range(totals[10])]
        return Report(
            threads=totals[0],
            accesses=totals[1],
            barriers=totals[2],
            threadgroup_bytes=totals[3],
            collectives=dict(sorted(names)),
            errors=[text for text in messages if not text.startswith(WARNINGS)],
            warnings=[text for text in messages if text.startswith(WARNINGS)],
            counts=self._counts(totals, held) if self.mode == "count" else None,
        )

    def _counts(self, totals: list[int], held: list[_Buffer]) -> Counts:
        runtime = native.runtime()
        buffers = {
            buffer.parameter.index: BufferCounts(*native.values(runtime.msl_host_buffer, 4, i))
            for i, buffer in enumerate(held)
        }
        instructions = {"load": totals[8], "store": totals[9]}
        for times, block in zip(self._blocks(), self.program.blocks, strict=True):
            for kind, count in block.items():
                instructions[kind] = instructions.get(kind, 0) + times * count
        return Counts(
            buffers=buffers,
            threadgroup_loaded=totals[4],
            threadgroup_stored=totals[5],
            private_loaded=totals[6],
            private_stored=totals[7],
            instructions=dict(sorted(instructions.items())),
        )
