"""Where two greedy runs diverge: is it a tie that rounding broke, or an error?

The same row computed among other rows uses other kernels or another order of sums, so its logits
differ in the last bits, and two nearly tied tokens may change places.  A divergence is judged by
its gap: the difference between the logits of the two tokens in the reference run.  Rounding can
close only a small gap; ``NEAR_TIE_EPS`` has the bound for each dtype.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

# Maximum gap of a near-tie, in units of eps times the largest |logit| of the row (errors of logits
# grow with the hidden state's norm, not with the two logits, which may be near zero).  Measured on
# a 30-layer model (SmolLM2-135M): steps of 2 to 25 rows against steps of one row moved the gap of
# the best two tokens by up to 9 float32 eps; against float32, float16 moved it by up to 4.5 of its
# eps and bfloat16 by up to 1.7 of its own (a product sums in float32 there and rounds once, so
# fewer roundings pile up).  The bounds are about twice that.
NEAR_TIE_EPS = {mx.float32: 16.0, mx.float16: 8.0, mx.bfloat16: 3.0}
EPS = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first position at which a run diverges from its reference.

    Attributes:
        prompt_id: id of the prompt.
        position: index into the emitted ids.
        expected: the reference's id; None if it ended before.
        actual: the run's id; None if it ended before.
        top_two: the reference's two most likely ids at this position.
        margin: difference of their logits.
        relative_margin: ``margin`` over the largest ``|logit|`` of the row.
        gap: difference of the logits of ``expected`` and ``actual``, which is ``margin`` if these
            are the top two.
        bound: the largest gap that counts as a near-tie here.
        near_tie: whether rounding explains the divergence.
        same_bits: whether the run's logits at this position have the reference's bits, so that
            not they but what was made of them differs; None if unknown.
    """

    prompt_id: str
    position: int
    expected: int | None
    actual: int | None
    top_two: tuple[int, int]
    margin: float
    relative_margin: float
    gap: float | None
    bound: float
    near_tie: bool
    same_bits: bool | None = None

    @property
    def are_top_two(self) -> bool:
        """Whether the two runs' ids are the reference's two most likely ones."""
        return {self.expected, self.actual} == set(self.top_two)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self) | {"are_top_two": self.are_top_two}

    def __str__(self) -> str:
        kind = "near-tie" if self.near_tie else "MISMATCH"
        gap = "" if self.gap is None else f"gap {self.gap:.3g}, "
        rows = {None: "", True: "; the logits have the same bits", False: "; their bits differ"}
        return (
            f"{kind}: {self.prompt_id}, token {self.position + 1}: expected {self.expected}, got "
            f"{self.actual} ({gap}bound {self.bound:.3g}; top two {self.top_two[0]} and "
            f"{self.top_two[1]}, margin {self.margin:.3g}"
            f"{rows[self.same_bits]})"
        )


def near_tie_bound(logits: mx.array, dtype: mx.Dtype) -> float:
    """Maximum difference of two logits of a row ``[V]`` that rounding in ``dtype`` may close."""
    return float(near_tie_bounds(logits[None], dtype)[0][0])


def near_tie_bounds(logits: mx.array, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """The same for rows ``[N, V]``: bounds ``[N]`` and the largest finite ``|logit|`` ``[N]``."""
    sizes = mx.abs(logits.astype(mx.float32))
    largest = mx.where(mx.isfinite(sizes), sizes, 0.0).max(axis=-1)
    values = np.array(largest, dtype=np.float64)
    return NEAR_TIE_EPS[dtype] * EPS[dtype] * values, values


def measure(
    logits: mx.array,
    *,
    dtype: mx.Dtype,
    prompt_id: str,
    position: int,
    expected: int | None,
    actual: int | None,
    same_bits: bool | None = None,
) -> Divergence:
    """Judge a divergence by the reference's logits.

    Args:
        logits: processed logits of the reference at the position, ``[V]``.
        dtype: type in which the model computes.
        prompt_id: id of the prompt.
        position: index into the emitted ids.
        expected: the reference's id; None if it ended before.
        actual: the run's id; None if it ended before.
        same_bits: whether the run's own logits have these bits; None if unknown.
    """
    row = _values(logits)
    first, second = (int(token) for token in np.argsort(-row, kind="stable")[:2])
    margin, largest = float(row[first] - row[second]), _largest(row)
    gap = None
    if expected is not None and actual is not None:
        gap = abs(float(row[expected] - row[actual]))
    bound = near_tie_bound(logits, dtype)
    return Divergence(
        prompt_id=prompt_id,
        position=position,
        expected=expected,
        actual=actual,
        top_two=(first, second),
        margin=margin,
        relative_margin=margin / largest if largest else 0.0,
        gap=gap,
        bound=bound,
        near_tie=gap is not None and gap <= bound,
        same_bits=same_bits,
    )


def _values(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32), dtype=np.float64)


def _largest(row: np.ndarray) -> float:
    """Maximum finite magnitude in a row of logits."""
    return float(np.abs(row[np.isfinite(row)]).max(initial=0.0))
