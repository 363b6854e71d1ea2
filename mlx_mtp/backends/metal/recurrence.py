"""What the kernels of recurrent layers have in common: which rows of a step follow which.

A step of a recurrent layer starts from the state before the last step's rows, runs those that were
kept again from their captured inputs, stores the state after them, and goes on with its own rows.
The state is thus read once and written once, whatever the layout, and no state is kept per row.
The source of the frame is in ``metal/recurrent_step.metal``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from mlx_mtp.model.layout import StepLayout

Rows = TypeVar("Rows")

_SMALLEST = 8  # elements; MLX passes smaller arrays in another address space


@dataclass(frozen=True, kw_only=True)
class StepRuns:
    """Rows of one recurrent step.

    Attributes:
        num_kept: rows of the last step that are run again first.
        groups: the masks after ordinary row ``t`` are rows ``groups[t]`` to ``groups[t + 1] - 1``;
            ``[1 + ordinary rows]``.
    """

    num_kept: int
    groups: tuple[int, ...]

    @classmethod
    def of(cls, layout: StepLayout, *, num_kept: int = 0) -> StepRuns:
        """The runs of a step's layout."""
        ends = [layout.num_ordinary] * layout.num_pending
        for count in layout.mask_counts:
            ends.append(ends[-1] + count)
        return cls(num_kept=num_kept, groups=tuple(ends))

    @property
    def num_ordinary(self) -> int:
        """Number of ordinary rows."""
        return len(self.groups) - 1

    def order(self) -> mx.array:
        """What the kernel reads (see ``StepOrder``), int32."""
        values = [self.num_kept, self.num_ordinary, *self.groups]
        return mx.array(values + [0] * (_SMALLEST - len(values)), dtype=mx.int32)


def run_rows(
    step: Callable[[Rows, int, mx.array], tuple[mx.array, mx.array]],
    rows: Rows,
    kept: Rows,
    runs: StepRuns,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Run the rows of a step one after another.

    Args:
        step: gives the result of one of ``rows`` after a state, and the state after that.
        rows: of the step, ordinary ones first.
        kept: rows of the last step, ``runs.num_kept`` of which are run first.
        runs: which rows follow which.
        state: before the kept rows.

    Returns:
        Results ``[L, ...]``, and the state after the kept rows.
    """
    for row in range(runs.num_kept):
        _, state = step(kept, row, state)
    stored = state
    ordinary, masks = [], []
    for t in range(runs.num_ordinary):
        y, state = step(rows, t, state)
        ordinary.append(y)
        branch = state
        for mask in range(runs.groups[t], runs.groups[t + 1]):
            y, branch = step(rows, mask, branch)
            masks.append(y)
    return mx.stack(ordinary + masks), stored


def fill_up(x: mx.array) -> mx.array:
    """Append rows, which are not read, where MLX would pass ``x`` in another address space."""
    if x.size >= _SMALLEST:
        return x
    short = -(-_SMALLEST * x.shape[0] // x.size) - x.shape[0]
    return mx.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1))
