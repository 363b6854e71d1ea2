"""Quantised matmuls as problems with a float64 answer, and what it takes to launch a kernel on one.

`y[M, N] = x[M, K] · dequant(W)[N, K]^T`, affine: a weight is `scale * q + bias`, one scale and bias
for each `group_size` weights along K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .arrays import from_bfloat16
from .kernel import Kernel, Report

MLX_TYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
METAL_TYPES = {"float16": "half", "bfloat16": "bfloat16_t", "float32": "float"}


def to_numpy(array: mx.array) -> np.ndarray:
    """An array as a kernel's buffer holds it: bfloat16 as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def to_float64(array: np.ndarray) -> np.ndarray:
    """A buffer's values; uint16 is bfloat16."""
    return (from_bfloat16(array) if array.dtype == np.uint16 else array).astype(np.float64)


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    bits: int = 4
    group_size: int = 64
    dtype: str = "float16"
    transpose: bool = True  # False: W is [K, N], grouped along N

    @property
    def metal_type(self) -> str:
        return METAL_TYPES[self.dtype]


@dataclass(frozen=True)
class Problem:
    """weight: uint32, packed; scales, biases: one a group; x: [M, K]; expected: float64 [M, N]."""

    shape: Shape
    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    x: np.ndarray
    expected: np.ndarray

    def output(self) -> np.ndarray:
        """An array for y, of x's type."""
        return np.zeros((self.shape.m, self.shape.n), self.x.dtype)

    def error(self, y: np.ndarray) -> float:
        """The largest difference from `expected`, relative to its largest element."""
        return float(np.abs(to_float64(y) - self.expected).max() / np.abs(self.expected).max())


def unpack(weight: np.ndarray, bits: int) -> np.ndarray:
    """Packed rows → the integers in them: a little-endian stream of bits."""
    stream = np.unpackbits(weight.view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(*weight.shape[:-1], -1, bits).astype(np.int64)
    return digits @ (1 << np.arange(bits))


def dequantise(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """float64 weights, exactly `scale * q + bias`."""
    values = unpack(weight, bits)
    group_size = values.shape[-1] // scales.shape[-1]
    grouped = [np.repeat(to_float64(a), group_size, axis=-1) for a in (scales, biases)]
    return grouped[0] * values + grouped[1]


def make_problem(shape: Shape, *, seed: int = 0) -> Problem:
    """Normal weights and inputs, quantised by MLX."""
    keys = mx.random.split(mx.random.key(seed), 2)
    dtype = MLX_TYPES[shape.dtype]
    size = (shape.n, shape.k) if shape.transpose else (shape.k, shape.n)
    w = mx.random.normal(size, key=keys[0]).astype(dtype)
    x = to_numpy(mx.random.normal((shape.m, shape.k), key=keys[1]).astype(dtype))
    packed = mx.quantize(w, group_size=shape.group_size, bits=shape.bits)
    weight, scales, biases = (to_numpy(array) for array in packed)
    values = dequantise(weight, scales, biases, shape.bits)
    expected = to_float64(x) @ (values.T if shape.transpose else values)
    return Problem(shape, weight, scales, biases, x, expected)


@dataclass(frozen=True)
class Launch:
    """A kernel and one call of it on a problem; buffers[output] is y; the names are for tables."""

    source: str
    name: str
    template_args: str
    grid: Sequence[int]  # in threads
    threadgroup: Sequence[int]
    buffers: dict[int, np.ndarray | np.generic]
    output: int
    roles: dict[int, str]  # buffer index → weight, scales, biases, x, y
    include: Sequence[str | Path] = ()

    def run(self, *, mode: str = "fast", **options) -> tuple[np.ndarray, Report]:
        """(y, report); y starts as if it held no data."""
        kernel = Kernel(self.source, self.name, self.template_args, mode=mode, include=self.include)
        report = kernel(self.grid, self.threadgroup, self.buffers, uninit=(self.output,), **options)
        y = self.buffers[self.output]
        assert isinstance(y, np.ndarray)
        return y, report
