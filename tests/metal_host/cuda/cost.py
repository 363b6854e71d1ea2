"""What rows cost on an NVIDIA GPU: milliseconds of M rows over those of one, ours and stock MLX's.

Not run on a GPU yet.  The weight is there several times, more than the cache holds, and launches
take one copy after the other, as the layers of a model would.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.matmul import PackedWeight

from ..our_kernels import text_of
from ..quantised import to_numpy
from .driver import pack
from .gpu import ROUNDS, Gpu

CACHES = 4  # the weights together are so many times the cache
MOST_COPIES = 64
MATRIX_SIMDGROUPS = 8  # with 16, rows beyond 8 need more registers than 512 threads have
TIMES = 20  # passes over all copies that are timed together


def copies_of(weight_bytes: int, cache_bytes: int) -> int:
    """How many copies of a weight make the cache useless; at least 2."""
    return min(max(-(-CACHES * cache_bytes // weight_bytes), 2), MOST_COPIES)


def with_ratios(rows: Sequence[dict]) -> list[dict]:
    """Lines of one kernel and type with `ratio`: to their line of one row, where there is one."""
    ones = {(row["kernel"], row["dtype"]): row["ms"] for row in rows if row["m"] == 1}
    # The matrix variant begins at 4 rows; below them the scalar one does the work.
    scalar = {dtype: ms for (kernel, dtype), ms in ones.items() if kernel == "our scalar"}
    found = []
    for row in rows:
        one = ones.get((row["kernel"], row["dtype"]))
        one = scalar.get(row["dtype"]) if one is None and row["kernel"] == "our matrix" else one
        found.append({**row, "ratio": row["ms"] / one if one else None})
    return found


def random_packed(n: int, k: int, *, bits: int, group_size: int, dtype: mx.Dtype) -> PackedWeight:
    """A quantised random weight."""
    weight = mx.random.normal((n, k), key=mx.random.key(0)).astype(dtype)
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    return PackedWeight(
        weight=packed, scales=scales, biases=biases, group_size=group_size, bits=bits
    )


def our_costs(gpu: Gpu, packed: PackedWeight, rows: Sequence[int]) -> Iterator[dict]:
    """A line for each variant and number of rows.

    Args:
        gpu: where to run.
        packed: the weight.
        rows: numbers of rows.
    """
    dtype = packed.scales.dtype
    arrays = [to_numpy(each) for each in (packed.weight, packed.scales, packed.biases)]
    size = sum(each.nbytes for each in arrays)
    copies = copies_of(size, gpu.driver.attribute("l2_bytes"))
    outputs, inputs = packed.shape
    x = mx.random.normal((max(rows), inputs), key=mx.random.key(1)).astype(dtype)
    with ExitStack() as stack:
        held = [stack.enter_context(gpu.held(arrays)) for _ in range(copies)]
        y_size = np.zeros(max(rows) * outputs * dtype.size, np.uint8)
        (y,) = stack.enter_context(gpu.held([y_size]))
        for m in rows:
            for variant in ("scalar", "matrix"):
                if variant == "matrix" and m < kernels.MATRIX_MIN_ROWS:
                    continue
                launch = kernels.skinny_qmm_launch(
                    x[:m], packed, variant=variant, simdgroups=MATRIX_SIMDGROUPS
                )
                ready = gpu.ready(text_of(launch))
                small = [to_numpy(launch.inputs[name]) for name in ("x", "shape")]
                with gpu.held(small) as (rows_at, shape_at):
                    arguments = [pack([rows_at, *weight, shape_at, y]) for weight in held]
                    ms = gpu.milliseconds(ready, arguments, times=TIMES)
                yield _line(f"our {variant}", dtype, m, ms, copies)


def stock_costs(packed: PackedWeight, rows: Sequence[int], *, copies: int) -> Iterator[dict]:
    """Lines of stock MLX on CUDA, by the clock over evaluations of TIMES passes.

    Raises:
        RuntimeError: MLX cannot run it there.
    """
    dtype = packed.scales.dtype
    x = mx.random.normal((max(rows), packed.shape[1]), key=mx.random.key(1)).astype(dtype)
    parts = (packed.weight, packed.scales, packed.biases)
    weights = [[mx.array(to_numpy(each)).view(each.dtype) for each in parts] for _ in range(copies)]
    for m in rows:
        some = mx.contiguous(x[:m])
        mx.eval(some, weights)

        def passes(some: mx.array = some) -> list[mx.array]:
            return [
                mx.quantized_matmul(
                    some, *weight, transpose=True, group_size=packed.group_size,
                    bits=packed.bits, stream=mx.gpu,
                )
                for _ in range(TIMES)
                for weight in weights
            ]  # fmt: skip

        found = []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            mx.eval(passes())
            found.append((time.perf_counter() - began) * 1e3)
        yield _line("stock MLX", dtype, m, statistics.median(found[1:]) / (TIMES * copies), copies)


def _line(kernel: str, dtype: mx.Dtype, m: int, ms: float, copies: int) -> dict:
    name = str(dtype).removeprefix("mlx.core.")
    return {"kernel": kernel, "dtype": name, "m": m, "ms": ms, "copies": copies}
