"""Which layout the next step gets.

``linear`` and ``quadratic`` are the paper's; ``plain`` never drafts.  ``auto`` is, for now, the
largest quadratic layout within four rows, one draft with one mask behind each ordinary row: few
devices take more rows for little (on the default model a second draft brings 1.71 tokens a step
instead of 1.51, but takes nine rows: ``python -m mlx_mtp.bench.throughput --every 3
--max-tokens 48 --modes quadratic --num-draft-tokens 1``, then 2).
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

from mlx_mtp.layout import StepLayout, linear_layout, plain_layout, quadratic_layout

LAYOUTS = ("auto", "linear", "quadratic", "plain")
AUTO_ROW_BUDGET = 4


class FixedPlanner:
    """Plans every step by one rule.

    Args:
        layout: one of ``LAYOUTS``.
        num_draft_tokens: k, masks in a group and drafts per step at most; 0 decodes plainly.

    Raises:
        ValueError: the layout is unknown.
    """

    def __init__(self, layout: str, *, num_draft_tokens: int) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.layout = layout if num_draft_tokens > 0 else "plain"
        self.num_draft_tokens = num_draft_tokens

    def plan(self, *, num_pending: int, num_waiting: int, room: int) -> StepLayout:
        """Plan one step.

        Args:
            num_pending: ordinary rows that must be in it.
            num_waiting: drafts that could be verified.
            room: tokens that may still be emitted, at least 1; drafts beyond it are useless.
        """
        drafts = min(num_waiting, self.num_draft_tokens, room - 1)
        if self.layout == "plain":
            return plain_layout(num_pending=num_pending)
        masks = min(self.num_draft_tokens, room)
        if self.layout == "linear":
            return _linear(num_pending, drafts, masks)
        if self.layout == "quadratic":
            return _quadratic(num_pending, drafts, masks)
        group = min(masks, isqrt(AUTO_ROW_BUDGET) - 1)
        return _quadratic(num_pending, min(drafts, group), group)


@lru_cache(maxsize=128)
def _linear(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return linear_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)


@lru_cache(maxsize=128)
def _quadratic(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return quadratic_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)
