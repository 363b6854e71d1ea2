"""Our kernels as launches on a problem, from the text that MLX would compile for them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.matmul import PackedWeight, Variant
from mlx_mtp.backends.metal.matmul import run_all as metal_run  # tests put another in its place

from .capture import KernelText, kernel_text
from .quantised import MLX_TYPES, Launch, Problem, to_numpy

ROLES = ("x", "weight", "scales", "biases", "shape", "y")


def text_of(launch: kernels.Launch) -> KernelText:
    """What MLX would compile for a launch."""
    names = list(launch.inputs)

    def call(*inputs: mx.array) -> list[mx.array]:
        return metal_run(replace(launch, inputs=dict(zip(names, inputs, strict=True))))

    return kernel_text(call, *launch.inputs.values())


def scalar(problem: Problem) -> Launch:
    """Up to eight rows a tile; a lane owns blocks of a weight row."""
    return _skinny(problem, "scalar")


def matrix(problem: Problem) -> Launch:
    """All rows in one threadgroup, on the matrix units."""
    return _skinny(problem, "matrix")


def _skinny(problem: Problem, variant: Variant) -> Launch:
    shape = problem.shape
    dtype = MLX_TYPES[shape.dtype]
    packed = PackedWeight(
        weight=mx.array(problem.weight),
        scales=_array(problem.scales, dtype),
        biases=_array(problem.biases, dtype),
        group_size=shape.group_size,
        bits=shape.bits,
    )
    launch = kernels.skinny_qmm_launch(_array(problem.x, dtype), packed, variant=variant)
    text = text_of(launch)
    inputs = [to_numpy(each) for each in launch.inputs.values()]
    buffers = text.buffers(inputs, [problem.output()])
    return Launch(
        source=text.source,
        name=text.name,
        template_args=text.template_args,
        grid=text.grid,
        threadgroup=text.threadgroup,
        buffers=dict(buffers),
        output=max(buffers),
        roles=dict(enumerate(ROLES)),
        include=text.include,
    )


def _array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(values).view(dtype) if dtype == mx.bfloat16 else mx.array(values)
