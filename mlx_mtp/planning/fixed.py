"""Planners with one layout for all steps: the paper's layouts, and plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mlx_mtp.model.layout import StepLayout, linear_layout, plain_layout, quadratic_layout
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import FIXED_LAYOUTS, Plan


class FixedPlanner:
    """Plans every step with the same layout, and verifies the drafts of the first offer.

    Args:
        layout: one of ``FIXED_LAYOUTS``.
        num_draft_tokens: k, maximum masks in a group; 0 has no mask rows.
        max_drafts: maximum drafts per step; as many as are offered if omitted.

    Raises:
        ValueError: the layout is unknown.
    """

    def __init__(
        self, layout: str, *, num_draft_tokens: int, max_drafts: int | None = None
    ) -> None:
        if layout not in FIXED_LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(FIXED_LAYOUTS)}, got {layout!r}")
        self.layout = layout
        self.num_draft_tokens = num_draft_tokens
        self._max_drafts = 2**30 if max_drafts is None else max_drafts

    def plan(self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), **_: Any) -> Plan:
        """Plan one step; ``AutoPlanner.plan`` has the arguments."""
        if self.layout == "plain":
            return Plan(plain_layout(num_pending=num_pending))
        offer = next((offer for offer in offers if offer.num_drafts), Offer("", 0))
        drafts = min(offer.num_drafts, self._max_drafts, room - 1)
        masks = min(self.num_draft_tokens, room)
        make = _linear if self.layout == "linear" else _quadratic
        return Plan(make(num_pending, drafts, masks), source=offer.source if drafts else "")

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


@lru_cache(maxsize=128)
def _linear(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return linear_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)


@lru_cache(maxsize=128)
def _quadratic(num_pending: int, drafts: int, masks: int) -> StepLayout:
    return quadratic_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=masks)
