"""Planners with one layout for all steps: the paper's layouts, and plain decoding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mlx_mtp.model.layout import StepLayout, linear_layout, plain_layout, quadratic_layout
from mlx_mtp.planning.plan import FIXED_LAYOUTS, MASK, Plan


class FixedPlanner:
    """Plans every step with the same layout.

    Args:
        layout: one of ``FIXED_LAYOUTS``.
        num_draft_tokens: k, maximum masks in a group and drafts per step; 0 decodes plainly.

    Raises:
        ValueError: the layout is unknown.
    """

    uses_lookup = False

    def __init__(self, layout: str, *, num_draft_tokens: int) -> None:
        if layout not in FIXED_LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(FIXED_LAYOUTS)}, got {layout!r}")
        self.layout = layout if num_draft_tokens > 0 else "plain"
        self.num_draft_tokens = num_draft_tokens

    def plan(self, *, num_pending: int, num_waiting: int, room: int, **_: Any) -> Plan:
        """Plan one step; ``AutoPlanner.plan`` has the arguments."""
        drafts = min(num_waiting, self.num_draft_tokens, room - 1)
        masks = min(self.num_draft_tokens, room)
        if self.layout == "plain":
            return Plan(plain_layout(num_pending=num_pending))
        make = _linear if self.layout == "linear" else _quadratic
        return Plan(make(num_pending, drafts, masks), source=MASK if drafts else "")

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


@lru_cache(maxsize=128)
def _linear(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return linear_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)


@lru_cache(maxsize=128)
def _quadratic(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return quadratic_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)
