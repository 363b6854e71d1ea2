"""The protocol of planners, and the choice of one."""

from __future__ import annotations

from typing import Protocol

from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.planning.plan import Plan


class Planner(Protocol):
    """Plans the steps of one answer; ``AutoPlanner`` documents the arguments.

    Attributes:
        uses_lookup: whether it makes use of looked-up drafts.
    """

    uses_lookup: bool

    def plan(
        self,
        *,
        num_pending: int,
        num_waiting: int,
        room: int,
        context: int = 0,
        num_lookup: int = 0,
        match: int = 0,
    ) -> Plan:
        """Plan one step."""
        ...

    def observe(
        self,
        plan: Plan,
        *,
        num_accepted: int,
        context: int,
        ms: float,
        match: int = 0,
        num_judged: int = 0,
        num_right: int = 0,
    ) -> None:
        """Learn from a step that ran."""
        ...


def make_planner(
    layout: str, *, num_draft_tokens: int, speculation: Speculation, lookup: bool = True
) -> Planner:
    """Make the planner of a layout.

    Args:
        layout: one of ``LAYOUTS``.
        num_draft_tokens: k; 0 drafts no tokens with masks.
        speculation: what the planner of ``"auto"`` knows; it keeps learning.
        lookup: whether ``"auto"`` may verify looked-up drafts.
    """
    if layout == "auto":
        return AutoPlanner(speculation, num_draft_tokens=num_draft_tokens, use_lookup=lookup)
    return FixedPlanner(layout, num_draft_tokens=num_draft_tokens)
