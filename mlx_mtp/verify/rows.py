"""Do rows that a step computes together have the bits that one row alone has?

Plain decoding computes one row per step.  A step with drafts computes several, and each row of its
logits is compared with plain decoding's at the same position, as far as both texts agree.  Where
all bits are the same, output cannot differ by rounding.  Where they are not, the gap between the
best two tokens has moved; ``near_tie`` has the bound up to which rounding explains that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.verify.near_tie import near_tie_bounds

MAX_ROWS = 64  # rows of an answer that are kept for comparison; large vocabularies make them big


@dataclass(kw_only=True)
class RowTally:
    """Rows of logits that were compared with plain decoding's.

    Attributes:
        compared: number of rows.
        differing: rows with at least one other bit.
        beyond_rounding: rows in which the gap between the best two tokens moved by more than
            rounding explains.
        largest_change: largest change of that gap, relative to the row's largest ``|logit|``.
    """

    compared: int = 0
    differing: int = 0
    beyond_rounding: int = 0
    largest_change: float = 0.0

    @property
    def verdict(self) -> str | None:
        """``"exact"``, ``"within rounding"``, ``"beyond rounding"``; None without any row."""
        if not self.compared:
            return None
        if self.beyond_rounding:
            return "beyond rounding"
        return "within rounding" if self.differing else "exact"

    def __add__(self, other: RowTally) -> RowTally:
        """Both together."""
        return RowTally(
            compared=self.compared + other.compared,
            differing=self.differing + other.differing,
            beyond_rounding=self.beyond_rounding + other.beyond_rounding,
            largest_change=max(self.largest_change, other.largest_change),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True, kw_only=True)
class NearestTie:
    """The row of plain decoding in which the best two tokens are closest.

    Attributes:
        prompt_id: id of the prompt.
        position: index into the emitted ids.
        margin: difference of the best two logits.
        relative_margin: ``margin`` over the row's largest ``|logit|``.
        bound: the largest gap that rounding may close in this row.
    """

    prompt_id: str
    position: int
    margin: float
    relative_margin: float
    bound: float


def compare_rows(reference: mx.array, actual: mx.array, dtype: mx.Dtype) -> RowTally:
    """Compare rows of logits with those of plain decoding.

    Args:
        reference: plain decoding's rows, ``[N, V]``.
        actual: rows at the same positions, ``[N, V]``.
        dtype: type in which the model computes.
    """
    if not len(reference):
        return RowTally()
    wide, other = reference.astype(mx.float32), actual.astype(mx.float32)
    same = np.array(have_same_bits(wide, other))
    best = mx.argpartition(-wide, 1, axis=-1)[:, :2]
    gaps, moved = (
        mx.take_along_axis(rows, best, axis=-1) @ mx.array([1.0, -1.0]) for rows in (wide, other)
    )
    change = np.where(same, 0.0, np.abs(np.array(moved - gaps, dtype=np.float64)))
    change = np.where(np.isnan(change), np.inf, change)
    bounds, largest = near_tie_bounds(reference, dtype)
    relative = change / np.where(largest > 0, largest, 1.0)
    return RowTally(
        compared=len(same),
        differing=int((~same).sum()),
        beyond_rounding=int((change > bounds).sum()),
        largest_change=float(relative.max()),
    )


def have_same_bits(reference: mx.array, actual: mx.array) -> mx.array:
    """Whether rows ``[..., V]`` have the same bits, ``[...]``; a wider type keeps them."""
    pair = [rows.astype(mx.float32).view(mx.uint32) for rows in (reference, actual)]
    return (pair[0] == pair[1]).all(axis=-1)


def nearest_tie(rows: mx.array, dtype: mx.Dtype, *, prompt_id: str) -> NearestTie | None:
    """Find the row ``[N, V]`` with the smallest margin in relation to its largest logit."""
    if not len(rows):
        return None
    top = mx.topk(rows.astype(mx.float32), 2, axis=-1)
    margins = np.abs(np.array(top[:, 0] - top[:, 1], dtype=np.float64))
    bounds, largest = near_tie_bounds(rows, dtype)
    relative = margins / np.where(largest > 0, largest, 1.0)
    position = int(np.argmin(np.where(np.isnan(relative), np.inf, relative)))
    return NearestTie(
        prompt_id=prompt_id,
        position=position,
        margin=float(margins[position]),
        relative_margin=float(relative[position]),
        bound=float(bounds[position]),
    )
