"""Whether our kernels are right on the device at hand, found out on a model's own weights.

The reference is float32 on weights that were dequantised in float32.  A row must have the same bits
whatever the number of rows beside it, and in both variants.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mtp.backends.metal.matmul import (
    MATRIX_MIN_ROWS,
    MAX_ROWS,
    PackedWeight,
    Variant,
    gated_lora_down_kernel,
    skinny_qmm_kernel,
    skinny_qmm_ops,
)
from mlx_mtp.model.lora import GatedTerm

CHECK_ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32)
GATED_ROWS = 9
TIMED_ROUNDS = 5
MATRIX_SIMDGROUPS = (16, 8)
FLOAT32_BOUND = 1e-5
HALF_ULP = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 0.0}
_RANK = 8


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Gated low-rank weights of one layer, to check with.

    Attributes:
        lora_a: ``[r, K]``.
        lora_b: ``[r, N]``.
        scale: factor.
        gate_split: index of the first adapted row.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    gate_split: int

    @classmethod
    def random(cls, packed: PackedWeight, *, gate_split: int) -> LowRank:
        """Weights that fit a packed weight."""
        outputs, inputs = packed.shape
        a_key, b_key = mx.random.split(mx.random.key(2))
        dtype = packed.scales.dtype
        a = mx.random.normal((_RANK, inputs), key=a_key) / inputs**0.5
        b = mx.random.normal((_RANK, outputs), key=b_key)
        return cls(lora_a=a.astype(dtype), lora_b=b.astype(dtype), scale=2.0, gate_split=gate_split)

    def term(self, low_rank: mx.array) -> GatedTerm:
        """What a matmul adds, given ``[G, r]``."""
        return GatedTerm(
            low_rank=low_rank,
            first_rank=0,
            lora_b=self.lora_b,
            scale=self.scale,
            gate_split=self.gate_split,
        )

    def product(self, x: mx.array) -> mx.array:
        """What the adapted rows of ``x`` get, float32 ``[G, N]``."""
        rows = x[self.gate_split :].astype(mx.float32)
        low = rows @ self.lora_a.astype(mx.float32).T
        return self.scale * (low @ self.lora_b.astype(mx.float32))


class Runner(Protocol):
    """Where kernels run; tests put one without a GPU here."""

    def ours(
        self, x: mx.array, packed: PackedWeight, *, variant: Variant, simdgroups: int
    ) -> mx.array:
        """Our kernel's result; RuntimeError, now or at its evaluation, where it cannot run."""
        ...

    def stock(self, x: mx.array, packed: PackedWeight) -> mx.array:
        """MLX's result."""
        ...

    def gated(
        self, x: mx.array, packed: PackedWeight, low: LowRank, *, variant: Variant, simdgroups: int
    ) -> mx.array:
        """Our kernel's result with gated low-rank weights."""
        ...

    def seconds(self, calls: Callable[[], list[mx.array]]) -> float:
        """Time some calls that are evaluated together."""
        ...


class MetalRunner:
    """This machine's GPU."""

    def ours(
        self, x: mx.array, packed: PackedWeight, *, variant: Variant, simdgroups: int
    ) -> mx.array:
        """Our kernel's result."""
        return skinny_qmm_kernel(x, packed, variant=variant, simdgroups=simdgroups)

    def stock(self, x: mx.array, packed: PackedWeight) -> mx.array:
        """MLX's result."""
        return skinny_qmm_ops(x, packed)

    def gated(
        self, x: mx.array, packed: PackedWeight, low: LowRank, *, variant: Variant, simdgroups: int
    ) -> mx.array:
        """Our kernel's result with gated low-rank weights."""
        low_rank = gated_lora_down_kernel(x, low.lora_a, gate_split=low.gate_split)
        term = low.term(low_rank)
        return skinny_qmm_kernel(x, packed, variant=variant, gated=term, simdgroups=simdgroups)

    def seconds(self, calls: Callable[[], list[mx.array]]) -> float:
        """Median over a few rounds, after one to compile and warm."""
        times = []
        for _ in range(1 + TIMED_ROUNDS):
            began = time.perf_counter()
            mx.eval(calls())
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What a self-check found for one shape.

    Attributes:
        scalar: whether the scalar variant is right.
        matrix: simdgroups with which the matrix variant is right and has the scalar one's bits;
            0 if with none.
        gated: whether the variants that are right also are with gated low-rank weights.
        problem: the last thing that was wrong.
    """

    scalar: bool
    matrix: int = 0
    gated: bool = False
    problem: str = ""


def self_check(
    packed: PackedWeight, runner: Runner, *, rows: Sequence[int] = CHECK_ROWS
) -> SelfCheck:
    """Compare our kernels with float32 on the dequantised weight, and rows with one another.

    Args:
        packed: a real weight.
        runner: where to run.
        rows: numbers of rows to try.
    """
    x = mx.random.normal((MAX_ROWS, packed.shape[1]), key=mx.random.key(0))
    x = x.astype(packed.scales.dtype)
    wanted = _reference(x, packed)
    scalar, problem = _checked(x, packed, runner, wanted, rows, variant="scalar")
    if scalar is None:
        return SelfCheck(scalar=False, problem=problem)
    many = [each for each in rows if each >= MATRIX_MIN_ROWS]
    found = 0
    for simdgroups in MATRIX_SIMDGROUPS:
        matrix, problem = _checked(
            x, packed, runner, wanted, many, variant="matrix", simdgroups=simdgroups
        )
        if matrix is None:
            continue
        if _same_bits(matrix, scalar[: matrix.shape[0]]):
            found = simdgroups
        else:
            problem = "the matrix units add in another order"
        break
    gated, gated_problem = _check_gated(x, packed, runner, wanted, scalar, simdgroups=found)
    return SelfCheck(scalar=True, matrix=found, gated=gated, problem=problem or gated_problem)


def _check_gated(
    x: mx.array,
    packed: PackedWeight,
    runner: Runner,
    wanted: mx.array,
    plain: mx.array,
    *,
    simdgroups: int,
) -> tuple[bool, str]:
    """Whether rows before the gate split keep their bits and the others get what they should."""
    low = LowRank.random(packed, gate_split=3)
    rows = x[:GATED_ROWS]
    wanted = mx.concatenate([wanted[:3], wanted[3:GATED_ROWS] + low.product(rows)])
    variants: list[Variant] = ["scalar", "matrix"] if simdgroups else ["scalar"]
    for variant in variants:
        try:
            y = runner.gated(rows, packed, low, variant=variant, simdgroups=simdgroups or 16)
            if not _same_bits(y[:3], plain[:3]):
                return False, f"the gated {variant} variant changes ordinary rows"
            if not _is_near(y, wanted):
                return False, f"the gated {variant} variant is wrong"
        except RuntimeError as error:
            return False, f"the gated {variant} variant does not run: {_first_line(error)}"
    return True, ""


def _checked(
    x: mx.array,
    packed: PackedWeight,
    runner: Runner,
    wanted: mx.array,
    rows: Sequence[int],
    *,
    variant: Variant,
    simdgroups: int = 16,
) -> tuple[mx.array | None, str]:
    """The result for most rows, if every number of rows gives the same right ones."""
    most = max(rows)
    try:
        whole = runner.ours(x[:most], packed, variant=variant, simdgroups=simdgroups)
        if not _is_near(whole, wanted[:most]):
            return None, f"the {variant} variant is wrong at {most} rows"
        for each in rows:
            some = runner.ours(x[:each], packed, variant=variant, simdgroups=simdgroups)
            if not _same_bits(some, whole[:each]):
                return None, f"the {variant} variant gives other bits at {each} rows"
    except RuntimeError as error:  # threadgroups too large, a compiler that refuses, no Metal
        return None, f"the {variant} variant does not run: {_first_line(error)}"
    return whole, ""


def _reference(x: mx.array, packed: PackedWeight) -> mx.array:
    """``[M, N]`` in float32 from weights that were dequantised in float32."""
    weight = mx.dequantize(
        packed.weight,
        packed.scales.astype(mx.float32),
        packed.biases.astype(mx.float32),
        group_size=packed.group_size,
        bits=packed.bits,
    )
    return x.astype(mx.float32) @ weight.T


def _is_near(y: mx.array, wanted: mx.array) -> bool:
    largest = mx.abs(wanted).max()
    bound = FLOAT32_BOUND * largest + HALF_ULP[y.dtype] * mx.abs(wanted)
    # A float32 matmul of the reference may round as much again.
    return bool(mx.all(mx.abs(y.astype(mx.float32) - wanted) <= 2 * bound).item())


def _same_bits(a: mx.array, b: mx.array) -> bool:
    kind = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    return bool(mx.array_equal(a.view(kind), b.view(kind)).item())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
