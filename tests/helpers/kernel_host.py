"""Our kernels on the CPU executor: launches, problems to launch them on, and a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal.matmul import Launch, PackedWeight
from tests.metal_host import Kernel, KernelText, Report, from_bfloat16
from tests.metal_host.mutants import mutant, mutants, original, switchable_barriers
from tests.metal_host.our_kernels import text_of

EPS = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # of the largest |y|


@functools.cache
def compiled(source: str, name: str, template_args: str, include: tuple, mode: str) -> Kernel:
    return Kernel(source, name, template_args, include=include, mode=mode)


def run_launch(launch: Launch, *, mode: str = "fast", **options: Any) -> tuple[mx.array, Report]:
    """Run a launch; returns ``y`` and what the executor saw."""
    outputs, report = run_launch_all(launch, mode=mode, **options)
    return outputs[0], report


def run_launch_all(
    launch: Launch, *, mode: str = "fast", **options: Any
) -> tuple[list[mx.array], Report]:
    """Run a launch; returns all its outputs and what the executor saw."""
    text = text_of(launch)
    kernel = compiled(text.source, text.name, text.template_args, text.include, mode)
    return launch_text_all(kernel, text, launch, **options)


def launch_text(
    kernel: Kernel, text: KernelText, launch: Launch, **options: Any
) -> tuple[mx.array, Report]:
    """Run a compiled kernel on a launch's inputs; returns ``y`` and what the executor saw."""
    outputs, report = launch_text_all(kernel, text, launch, **options)
    return outputs[0], report


def launch_text_all(
    kernel: Kernel, text: KernelText, launch: Launch, **options: Any
) -> tuple[list[mx.array], Report]:
    """Run a compiled kernel on a launch's inputs; returns its outputs and what the executor saw."""
    shapes = launch.outputs.values()
    outputs = [np.array(to_numpy(mx.zeros(shape, dtype=dtype))) for shape, dtype in shapes]
    buffers = text.buffers([to_numpy(each) for each in launch.inputs.values()], outputs)
    places = sorted(buffers)[-len(outputs) :]
    report = kernel(text.grid, text.threadgroup, buffers, uninit=tuple(places), **options)
    types = [dtype for _, dtype in shapes]
    return [from_numpy(y, dtype) for y, dtype in zip(outputs, types, strict=True)], report


def unseen_mutants(
    launch: Launch, *, start: int, text: KernelText, skip: Callable[[int, str], bool]
) -> list[tuple[int, str]]:
    """Barriers that can be taken out or weakened without a race that check mode sees.

    Args:
        launch: what to run; as it is written it must be free of findings.
        start: where in the text barriers begin to count.
        text: of the launch.
        skip: tells of a barrier and a way to weaken it whether the launch can do with it.
    """
    source, scopes = switchable_barriers(text.source, start=start)
    kernel = Kernel(source, text.name, text.template_args, include=text.include, mode="check")
    _, report = launch_text(kernel, text, launch, constants=original(), raise_on_error=False)
    assert not report.errors and not report.warnings
    tried = [each for each in mutants(scopes) if not skip(*each)]
    assert tried
    unseen = []
    for barrier, how in tried:
        seen = []
        for seed in (0, 1):
            _, report = launch_text(
                kernel, text, launch, constants=mutant(barrier, how), seed=seed,
                raise_on_error=False,
            )  # fmt: skip
            seen += report.errors
        if not any(error.startswith("RACE") for error in seen):
            unseen.append((barrier, how))
    return unseen


def to_numpy(x: mx.array) -> np.ndarray:
    """The array's elements where they lie, with its strides; bfloat16 as its bits."""
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def from_numpy(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The way back."""
    return mx.array(from_bfloat16(x) if dtype == mx.bfloat16 else x).astype(dtype)


def float64(x: mx.array) -> np.ndarray:
    """The array's values."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def random_weight(
    outputs: int,
    inputs: int,
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> PackedWeight:
    """A quantised random weight."""
    weight = mx.random.normal((outputs, inputs), key=mx.random.key(seed))
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    return PackedWeight(
        weight=packed,
        scales=scales.astype(dtype),
        biases=biases.astype(dtype),
        group_size=group_size,
        bits=bits,
    )


def random_rows(rows: int, inputs: int, *, dtype: mx.Dtype = mx.float32, seed: int = 1) -> mx.array:
    """Rows to multiply."""
    return mx.random.normal((rows, inputs), key=mx.random.key(seed)).astype(dtype)


def exact_product(x: mx.array, packed: PackedWeight) -> np.ndarray:
    """``[M, N]`` in float64 on the dequantised weight."""
    weight = mx.dequantize(
        packed.weight,
        packed.scales.astype(mx.float32),
        packed.biases.astype(mx.float32),
        group_size=packed.group_size,
        bits=packed.bits,
    )
    return float64(x) @ float64(weight).T


def relative_error(y: mx.array, wanted: np.ndarray) -> float:
    """Largest error over the largest value."""
    assert y.shape == wanted.shape
    return float(np.abs(float64(y) - wanted).max() / np.abs(wanted).max())
