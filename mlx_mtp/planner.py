"""Which layout the next step gets.

``linear`` and ``quadratic`` are the paper's; ``auto`` is, for now, a fixed budget of rows that
pays on hardware where a row costs something; ``plain`` never drafts.
"""

from __future__ import annotations

from functools import lru_cache

from mlx_mtp.layout import StepLayout, linear_layout, plain_layout, quadratic_layout

LAYOUTS = ("auto", "linear", "quadratic", "plain")
AUTO_ROW_BUDGET = 9


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
        return _budget(num_pending, drafts, masks)


@lru_cache(maxsize=128)
def _linear(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return linear_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)


@lru_cache(maxsize=128)
def _quadratic(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return quadratic_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)


@lru_cache(maxsize=128)
def _budget(num_pending: int, drafts: int, masks: int) -> StepLayout:
    """Quadratic groups as large as the row budget allows, at least one mask each."""
    drafts = min(drafts, 2)
    group = max(1, min(masks, (AUTO_ROW_BUDGET - 1 - drafts) // (drafts + 1)))
    return quadratic_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=group)
