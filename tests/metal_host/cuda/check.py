"""Whether our kernels are right where they run: against float64, and row by row bit for bit.

Every check takes `run`, which runs a launch; a GPU's or the CPU executor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.attention import HEAD_DIMS, merge_launch, step_attention_launch
from mlx_mtp.backends.metal.matmul import Launch, PackedWeight, Variant
from mlx_mtp.backends.metal.operation import HALF_ULP
from mlx_mtp.backends.metal.operations import LowRank

from ..attention import make_attention
from ..quantised import MLX_TYPES, Problem, Shape, make_problem, to_float64, to_numpy

Run = Callable[[Launch], mx.array]
VARIANTS: tuple[tuple[Variant, int], ...] = (("scalar", 16), ("matrix", 16), ("matrix", 8))
DTYPES = ("float16", "bfloat16", "float32")
BOUND = 1e-5  # of the largest value, before the one rounding
ALL_ROWS = range(1, kernels.MAX_ROWS + 1)
GATE_SPLIT, GATED_ROWS = 3, 9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        what: was checked.
        right: whether every element is within the bound and every row has the bits it has alone.
        error: the largest, over the largest value.
        wrong: the first thing that was wrong.
    """

    what: str
    right: bool
    error: float
    wrong: str = ""


class _Judge:
    """Collects what is wrong with several results of one check."""

    def __init__(self, what: str) -> None:
        self.what, self.error, self.wrong = what, 0.0, ""

    def near(self, y: mx.array, expected: np.ndarray, name: str) -> None:
        """One float32 sum and one rounding away from float64, at most."""
        largest = np.abs(expected).max()
        apart = np.abs(to_float64(to_numpy(y)) - expected)
        bound = BOUND * largest + HALF_ULP[y.dtype] * np.abs(expected)
        self.error = max(self.error, float(np.nan_to_num(apart.max() / largest, nan=np.inf)))
        if not np.all(apart <= bound):
            self._note(f"{name}: far from float64")

    def same_bits(self, y: mx.array, wanted: mx.array, name: str) -> None:
        if to_numpy(y).tobytes() != to_numpy(wanted).tobytes():
            self._note(f"{name}: other bits")

    def _note(self, wrong: str) -> None:
        self.wrong = self.wrong or wrong

    def finding(self) -> Finding:
        return Finding(what=self.what, right=not self.wrong, error=self.error, wrong=self.wrong)


def check_rows(run: Run, shape: Shape, *, rows: Sequence[int] = ALL_ROWS) -> Finding:
    """The quantised matmul of several numbers of rows, both variants.

    Args:
        run: runs a launch.
        shape: of the weight; its `m` is the largest of `rows`.
        rows: numbers of rows.
    """
    judge = _Judge(
        f"matmul {shape.n}x{shape.k}, {shape.bits} bits by {shape.group_size}, {shape.dtype}"
    )
    problem = make_problem(shape)
    x, packed = _arrays(problem)
    alone = mx.concatenate(
        [run(kernels.skinny_qmm_launch(x[i : i + 1], packed)) for i in range(shape.m)]
    )
    for count in rows:
        for variant, simdgroups in VARIANTS:
            launch = kernels.skinny_qmm_launch(
                x[:count], packed, variant=variant, simdgroups=simdgroups
            )
            y, name = run(launch), f"{variant}, {count} rows"
            judge.near(y, problem.expected[:count], name)
            judge.same_bits(y, alone[:count], name)
    return judge.finding()


def check_gated(run: Run, shape: Shape) -> Finding:
    """Gated low-rank weights on top: earlier rows keep their bits.

    Args:
        run: runs a launch.
        shape: of the weight, and more rows than GATE_SPLIT.
    """
    judge = _Judge(f"gated {shape.n}x{shape.k}, {shape.dtype}")
    problem = make_problem(shape)
    x, packed = _arrays(problem)
    low = LowRank.random(packed, gate_split=GATE_SPLIT)
    a, b = (to_float64(to_numpy(each)) for each in (low.lora_a, low.lora_b))
    expected = problem.expected.copy()
    expected[GATE_SPLIT:] += low.scale * (to_float64(problem.x)[GATE_SPLIT:] @ a.T) @ b
    low_rank = run(kernels.gated_lora_down_launch(x, low.lora_a, gate_split=GATE_SPLIT))
    plain = run(kernels.skinny_qmm_launch(x, packed))
    for variant, simdgroups in VARIANTS:
        launch = kernels.skinny_qmm_launch(
            x, packed, variant=variant, gated=low.term(low_rank), simdgroups=simdgroups
        )
        y = run(launch)
        judge.near(y, expected, variant)
        judge.same_bits(y[:GATE_SPLIT], plain[:GATE_SPLIT], f"{variant}, ordinary rows")
    return judge.finding()


def check_attention(
    run: Run, rows: int, keys: int, *, head_dim: int, dtype: str, heads: int = 6, kv_heads: int = 2
) -> Finding:
    """Step attention, each row seeing the keys up to its own; and each row alone."""
    judge = _Judge(f"attention of {rows} rows to {keys} keys, heads of {head_dim}, {dtype}")
    problem = make_attention(rows, keys, heads, kv_heads, head_dim, dtype)
    kind = MLX_TYPES[dtype]
    queries, held, values = (
        mx.array(each).view(kind)[None] for each in (problem.queries, problem.keys, problem.values)
    )
    y = _attend(run, queries, held, values)
    judge.near(y, problem.expected, "all rows")
    for row in range(rows):
        seen = keys - rows + row + 1
        alone = _attend(
            run, queries[:, :, row : row + 1], held[..., :seen, :], values[..., :seen, :]
        )
        judge.same_bits(y[:, row : row + 1], alone, f"row {row}")
    return judge.finding()


def all_checks(run: Run) -> Iterator[Finding]:
    """Formats, awkward shapes, 1 to 32 rows, gated weights, attention."""
    large = kernels.MAX_ROWS
    for dtype in DTYPES:
        for n, k, size in ((40, 1216, 32), (576, 1536, 32), (1024, 4096, 64), (19, 192, 64)):
            yield check_rows(run, Shape(large, n, k, 4, size, dtype))
    for i, bits in enumerate(kernels.BITS):
        for j, size in enumerate(kernels.GROUP_SIZES):
            shape = Shape(large, 72, 8 * size + 128, bits, size, DTYPES[(i + j) % 3])
            yield check_rows(run, shape, rows=(1, 5, 9, 17, 32))
    for dtype in DTYPES:
        yield check_gated(run, Shape(GATED_ROWS, 96, 1024, dtype=dtype))
    for i, head_dim in enumerate(HEAD_DIMS):
        for rows, keys in ((1, 1), (3, 130), (8, 700), (32, 2049)):
            yield check_attention(run, rows, keys, head_dim=head_dim, dtype=DTYPES[i % 3])


def _arrays(problem: Problem) -> tuple[mx.array, PackedWeight]:
    kind = MLX_TYPES[problem.shape.dtype]
    x, scales, biases = (
        mx.array(each).view(kind) for each in (problem.x, problem.scales, problem.biases)
    )
    packed = PackedWeight(
        weight=mx.array(problem.weight),
        scales=scales,
        biases=biases,
        group_size=problem.shape.group_size,
        bits=problem.shape.bits,
    )
    return x, packed


def _attend(run: Run, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """``[H, M, D]``."""
    heads, rows, dims = queries.shape[1:]
    mask = "causal" if rows > 1 else None
    launch = step_attention_launch(queries, keys, values, scale=dims**-0.5, mask=mask)
    y = run(merge_launch(run(launch), heads=heads, dtype=queries.dtype))
    return y[0].transpose(1, 0, 2)
