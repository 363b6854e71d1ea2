"""Launches of our kernels on an NVIDIA GPU, and how long they take.

Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal.matmul import Launch

from ..arrays import from_bfloat16
from ..capture import KernelText
from ..our_kernels import text_of
from ..quantised import to_numpy
from .build import build
from .driver import CAPTURE_THREAD_LOCAL, NON_BLOCKING, Driver, Packed, pack
from .translate import ENTRY, CudaUnit

ROUNDS = 7
UNWRITTEN = 0xFF  # every half, bfloat16 and float32 of such bytes is no number


@dataclass(frozen=True)
class Ready:
    """A kernel in the GPU's memory, and how it is launched."""

    function: ctypes.c_void_p
    unit: CudaUnit


class Gpu:
    """A GPU that runs our kernels; what it compiled it keeps."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.arch = driver, driver.arch()
        self._functions: dict[str, ctypes.c_void_p] = {}

    def ready(self, text: KernelText) -> Ready:
        """Compile and load.

        Raises:
            MslError: it does not compile.
            DriverError: the GPU does not take it.
        """
        built = build(text, arch=self.arch)
        source = built.unit.source
        if source not in self._functions:
            self._functions[source] = self.driver.function(built.cubin, ENTRY)
        return Ready(self._functions[source], built.unit)

    def run(self, launch: Launch) -> mx.array:
        """The result of a launch.

        Raises:
            MslError: it does not compile.
            DriverError: the GPU does not run it.
        """
        text = text_of(launch)
        ready = self.ready(text)
        y = to_numpy(mx.zeros(launch.output_shape, dtype=launch.output_dtype)).copy()
        inputs = [to_numpy(each) for each in launch.inputs.values()]
        buffers = text.buffers(inputs, [y])
        with self.held([buffers[i] for i in range(len(buffers))]) as pointers:
            self.driver.fill(pointers[-1], UNWRITTEN, y.nbytes)
            unit = ready.unit
            self.driver.launch(ready.function, unit.grid, unit.block, pack(pointers))
            self.driver.download(pointers[-1], y)
        dtype = launch.output_dtype
        return mx.array(from_bfloat16(y) if dtype == mx.bfloat16 else y).astype(dtype)

    @contextmanager
    def held(self, arrays: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Copies of arrays in the GPU's memory, given back at the end."""
        pointers: list[int] = []
        try:
            for array in arrays:
                pointers.append(self.driver.upload(array))
            yield pointers
        finally:
            for pointer in pointers:
                self.driver.free(pointer)

    def milliseconds(self, ready: Ready, arguments: Sequence[Packed], *, times: int) -> float:
        """Of one launch: the median over rounds of `times` passes over all arguments.

        The launches of a pass are a graph, so that the host takes no part in what is measured.
        """
        driver, unit = self.driver, ready.unit
        # A kernel may be loaded at its first launch, which must not be while a graph is made; and
        # copies are done before another stream begins.
        driver.launch(ready.function, unit.grid, unit.block, arguments[0])
        driver.call("cuCtxSynchronize")
        stream = driver.handle("cuStreamCreate", NON_BLOCKING)
        start, end = (driver.handle("cuEventCreate", 0) for _ in range(2))
        graph = self._captured(stream, ready, arguments)
        found = []
        for _ in range(1 + ROUNDS):
            driver.call("cuEventRecord", start, stream)
            for _ in range(times):
                driver.call("cuGraphLaunch", graph, stream)
            driver.call("cuEventRecord", end, stream)
            driver.call("cuStreamSynchronize", stream)
            passed = ctypes.c_float()
            driver.call("cuEventElapsedTime", ctypes.byref(passed), start, end)
            found.append(passed.value)
        driver.call("cuGraphExecDestroy", graph)
        for event in (start, end):
            driver.call("cuEventDestroy_v2", event)
        driver.call("cuStreamDestroy_v2", stream)
        return statistics.median(found[1:]) / (times * len(arguments))

    def _captured(
        self, stream: ctypes.c_void_p, ready: Ready, arguments: Sequence[Packed]
    ) -> ctypes.c_void_p:
        """A graph of one launch for each of the arguments, one after the other."""
        driver, unit, graph = self.driver, ready.unit, ctypes.c_void_p()
        driver.call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)
        for packed in arguments:
            driver.launch(ready.function, unit.grid, unit.block, packed, stream)
        driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        made = driver.handle("cuGraphInstantiateWithFlags", graph, 0)
        driver.call("cuGraphDestroy", graph)
        return made
