"""The text that `mx.fast.metal_kernel` would have compiled, taken from MLX itself.

`mx.export_function` traces a function without running it, so this works where there is no GPU; the
traced kernel carries the source that MLX generated, its grid and its threadgroup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided

from .errors import MslError
from .mlx_headers import include_folder, kernel_source

INSTANCE = re.compile(r"decltype\((?P<name>\w+)(?P<args><.*>)\)")


@dataclass(frozen=True)
class KernelText:
    """What MLX hands to the Metal compiler, and how it would launch it.

    `Kernel(text.source, text.name, text.template_args, include=text.include)` compiles it;
    `text.buffers(inputs, outputs)` numbers its arguments as MLX does."""

    source: str  # MLX's utils.h, then the header and the generated kernel
    name: str
    template_args: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    include: tuple[Path, ...]
    metadata: tuple[tuple[bool, bool, bool], ...]  # per input: takes its shape, strides, ndim
    initialised: bool  # outputs start at init_value
    row_contiguous: bool = True  # MLX copies inputs that are not

    def buffers(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> dict[int, np.ndarray]:
        """Arguments by buffer index; inputs in the kernel's order, with their strides where MLX
        would hand them over as they are."""
        arguments: list[np.ndarray] = []
        for given, (shape, strides, ndim) in zip(inputs, self.metadata, strict=True):
            array = np.ascontiguousarray(given) if self.row_contiguous else given
            steps = np.array(array.strides, np.int64) // array.itemsize
            arguments.append(_memory(array))
            arguments += [np.array(array.shape, np.int32)] * shape
            arguments += [steps] * strides + [np.array(array.ndim, np.int32)] * ndim
        return dict(enumerate([*arguments, *outputs]))


def _memory(array: np.ndarray) -> np.ndarray:
    """What lies from an array's first element to its last, in memory's order."""
    if array.flags.c_contiguous:
        return array
    last = sum((size - 1) * step for size, step in zip(array.shape, array.strides, strict=True))
    length = last // array.itemsize + 1
    return as_strided(array, (length,), (array.itemsize,), writeable=False)


def kernel_texts(fn: Callable, *inputs: mx.array) -> list[KernelText]:
    """One entry for each `metal_kernel` call that fn(*inputs) makes, in order."""
    found: list[KernelText] = []

    def look(node: dict) -> None:
        if node.get("type") == "primitive" and node.get("name") == "CustomKernel":
            found.append(_read(node["arguments"]))

    mx.export_function(look, fn, *inputs)
    return found


def kernel_text(fn: Callable, *inputs: mx.array) -> KernelText:
    """The text of the only Metal kernel that fn(*inputs) calls; MslError if there is not one."""
    found = kernel_texts(fn, *inputs)
    if len(found) != 1:
        raise MslError(f"the function calls {len(found)} Metal kernels, not one")
    return found[0]


def _read(arguments: list) -> KernelText:
    name, text, *numbers = arguments[:8]
    metadata = tuple(tuple(bool(flag) for flag in flags) for flags in arguments[8])
    instance = INSTANCE.search(text)
    return KernelText(
        source=kernel_source() + text,
        name=name,
        template_args=instance.group("args") if instance else "",
        grid=(numbers[0], numbers[1], numbers[2]),
        threadgroup=(numbers[3], numbers[4], numbers[5]),
        include=(include_folder(),),
        metadata=metadata,  # type: ignore[arg-type]
        initialised=arguments[10] is not None,
        row_contiguous=bool(arguments[9]),
    )
