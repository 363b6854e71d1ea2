"""What attention for few rows moves and computes: ours beside MLX's `sdpa_vector`.

The least: every key and value once, every query and output once; two multiply-adds for each query
head, key and dimension.  Each row sees all keys up to its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.attention import merge_launch, step_attention_launch

from .kernel import Kernel, Report
from .mlx_headers import attention_source, include_folder
from .our_kernels import text_of
from .quantised import METAL_TYPES, MLX_TYPES, to_float64, to_numpy

CONSTANTS = {number: np.bool_(False) for number in (20, 21, 23, 24, 25)}
Buffers = dict[int, Any]


@dataclass(frozen=True)
class AttentionProblem:
    """queries: [H, M, D]; keys, values: [Hkv, N, D]; expected: float64 [H, M, D]."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    dtype: str
    expected: np.ndarray

    @property
    def shared_by(self) -> int:
        return self.queries.shape[0] // self.keys.shape[0]

    @property
    def least_bytes(self) -> int:
        return 2 * self.queries.nbytes + self.keys.nbytes + self.values.nbytes

    @property
    def least_products(self) -> int:
        return 2 * self.queries.size * self.keys.shape[1]


@dataclass(frozen=True)
class Pass:
    """A launch that was run: threadgroups, the report, buffer index of keys and of values."""

    threadgroups: int
    report: Report
    keys: tuple[int, ...] = ()


def make_attention(
    rows: int, count: int, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> AttentionProblem:
    """Normal queries, keys and values."""
    seeds = mx.random.split(mx.random.key(0), 3)
    sizes = ((heads, rows, head_dim), (kv_heads, count, head_dim), (kv_heads, count, head_dim))
    arrays = [
        to_numpy(mx.random.normal(size, key=key).astype(MLX_TYPES[dtype]))
        for size, key in zip(sizes, seeds, strict=True)
    ]
    queries, keys, values = arrays
    q, k, v = (to_float64(each) for each in arrays)
    k, v = (np.repeat(each, heads // kv_heads, axis=0) for each in (k, v))
    scores = np.exp(q @ k.transpose(0, 2, 1) * head_dim**-0.5)
    weights = scores * np.tri(rows, count, count - rows)
    expected = weights @ v / weights.sum(-1, keepdims=True)
    return AttentionProblem(queries, keys, values, dtype, expected)


def sdpa_vector(problem: AttentionProblem) -> tuple[np.ndarray, list[Pass]]:
    """MLX's kernel for up to 8 rows: a threadgroup for each row and head."""
    heads, rows, dims = problem.queries.shape
    count = problem.keys.shape[1]
    out = np.zeros_like(problem.queries)
    buffers: Buffers = {0: problem.queries, 1: problem.keys, 2: problem.values, 3: out}
    buffers |= {4: np.int32(problem.shared_by), 5: np.int32(count), 10: np.float32(dims**-0.5)}
    strides = {6: count * dims, 7: dims, 8: count * dims, 9: dims}
    buffers |= {index: np.uint64(stride) for index, stride in strides.items()}
    buffers |= {index: np.int32(0) for index in (13, 14, 15)} | {17: np.int32(heads)}
    kernel = Kernel(
        attention_source(),
        "sdpa_vector",
        f"<{METAL_TYPES[problem.dtype]}, {dims}, {dims}>",
        include=[include_folder()],
        mode="count",
    )
    constants = CONSTANTS | {22: np.bool_(rows > 1), 26: np.int32(1)}
    grid = (heads * 1024, rows, 1)
    report = kernel(grid, (1024, 1, 1), buffers, constants=constants, uninit=(3,))
    return out, [Pass(heads * rows, report, keys=(1, 2))]


def step_attention(problem: AttentionProblem) -> tuple[np.ndarray, list[Pass]]:
    """Ours: spans of keys, then the sum over spans."""
    dtype = MLX_TYPES[problem.dtype]
    arrays = [
        mx.array(each)[None].view(dtype) for each in (problem.queries, problem.keys, problem.values)
    ]
    heads, rows, dims = problem.queries.shape
    mask = "causal" if rows > 1 else None
    spans = step_attention_launch(arrays[0], arrays[1], arrays[2], scale=dims**-0.5, mask=mask)
    partial, first = _run(spans)
    merge = merge_launch(mx.array(partial), heads=heads, dtype=dtype)
    y, second = _run(merge)
    return y[0].transpose(1, 0, 2), [first, second]


def _run(launch: kernels.Launch) -> tuple[np.ndarray, Pass]:
    names, text = list(launch.inputs), text_of(launch)
    y = np.array(to_numpy(mx.zeros(launch.output_shape, dtype=launch.output_dtype)))
    buffers = text.buffers([to_numpy(each) for each in launch.inputs.values()], [y])
    kernel = Kernel(text.source, text.name, text.template_args, include=text.include, mode="count")
    report = kernel(text.grid, text.threadgroup, buffers, uninit=(max(buffers),))
    places = np.cumsum([0, *(1 + sum(extra) for extra in text.metadata)])
    held = tuple(int(places[names.index(name)]) for name in ("keys", "values") if name in names)
    groups = int(np.prod([-(-a // b) for a, b in zip(text.grid, text.threadgroup, strict=True)]))
    return y, Pass(groups, report, held)


CONTENDERS: dict[str, Callable[[AttentionProblem], tuple[np.ndarray, list[Pass]]]] = {
    "mlx sdpa_vector": sdpa_vector,
    "our step attention": step_attention,
}


def measure_attention(label: str, problem: AttentionProblem) -> dict[str, float]:
    """One row of the table: ratios to the least; `error` relative to float64."""
    y, passes = CONTENDERS[label](problem)
    counts = [(each, each.report.counts) for each in passes if each.report.counts]
    moved = sum(
        buffer.per_threadgroup + buffer.stored for _, c in counts for buffer in c.buffers.values()
    )
    held = [(c.buffers[i], each) for each, c in counts for i in each.keys]
    kinds = [c.instructions for _, c in counts]
    products = sum(kind.get(name, 0) for kind in kinds for name in ("fma", "multiply"))
    held_bytes = problem.keys.nbytes + problem.values.nbytes
    return {
        "bytes": moved / problem.least_bytes,
        "keys": sum(buffer.per_threadgroup for buffer, _ in held) / held_bytes,
        "lanes": sum(buffer.loaded for buffer, _ in held) / held_bytes,
        "madds": products / problem.least_products,
        "groups": passes[0].threadgroups,
        "error": float(
            np.abs(to_float64(y) - problem.expected).max() / np.abs(problem.expected).max()
        ),
    }
