"""The protocol of planners, and the choice of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import TREE, Plan


class Planner(Protocol):
    """Plans the steps of one answer; ``AutoPlanner`` documents the arguments."""

    def plan(
        self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), context: int = 0
    ) -> Plan:
        """Plan one step."""
        ...

    def observe(self, plan: Plan, *, last_node: int, context: int, ms: float) -> None:
        """Learn from a step that ran."""
        ...


def make_planner(
    layout: str,
    *,
    num_draft_tokens: int,
    speculation: Speculation,
    max_drafts: int | None = None,
    max_rows: int = 16,
) -> Planner:
    """Make the planner of a layout.

    Args:
        layout: one of ``LAYOUTS``.
        num_draft_tokens: k, maximum drafts of mask tokens; 0 has no mask rows.
        max_drafts: maximum drafts per step of a fixed layout, from whatever drafter; by default
            as many as are offered.
        max_rows: maximum rows of a step with layout ``"tree"``.
        speculation: what the planners of ``"auto"`` and ``"tree"`` know; it keeps learning.
    """
    if layout == "auto":
        return AutoPlanner(speculation, num_draft_tokens=num_draft_tokens)
    if layout == TREE:
        speculation = speculation.with_row_budget(max_rows)
        return AutoPlanner(speculation, num_draft_tokens=num_draft_tokens)
    return FixedPlanner(layout, num_draft_tokens=num_draft_tokens, max_drafts=max_drafts)
