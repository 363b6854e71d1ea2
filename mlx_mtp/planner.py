"""The planner behind ``auto``: spends rows where drafts are likely to hold, where rows are cheap.

It knows what steps cost here (``LiveCosts``) and how drafts have held so far (``Acceptance``), and
follows the best rule for both (``policy``), which it works out anew every few steps.  Where plain
decoding wins, nothing is drafted; now and then two masks are tried again, each time after a longer
pause.  Drafts found by suffix lookup take a step whenever they are worth more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mlx_mtp.acceptance import UNKNOWN, Acceptance
from mlx_mtp.cost_curve import UNMEASURED, LiveCosts
from mlx_mtp.decision import LOOKUP, MASK, Decision
from mlx_mtp.fixed_planner import FIXED_LAYOUTS
from mlx_mtp.layout import StepLayout
from mlx_mtp.lookup import LONGEST_LOOKUP, LookupAcceptance
from mlx_mtp.policy import (
    FORGET,
    MOST_ROUNDS,
    Policy,
    StepPlan,
    best_policy,
    expected_tokens,
    step_ms,
)

LAYOUTS = ("auto", *FIXED_LAYOUTS)
REFRESH_STEPS = 32  # steps between two looks for the best rule
EARLY_REFRESH = (2, 4, 8, 16)  # more looks while little is known
PROBE_MASKS = 2
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # plain steps before drafting is tried again


@dataclass
class Speculation:
    """What a model's planner knows, from one answer to the next.

    Attributes:
        costs: what steps cost here.
        acceptance: how the adapter's drafts hold.
        lookup: how looked-up drafts hold.
    """

    costs: LiveCosts
    acceptance: Acceptance
    lookup: LookupAcceptance = field(default_factory=LookupAcceptance)

    @classmethod
    def guess(cls, num_draft_tokens: int) -> Speculation:
        """Where nothing is known yet."""
        acceptance = Acceptance([UNKNOWN] * max(num_draft_tokens, 1))
        return cls(LiveCosts(UNMEASURED), acceptance)

    def repeatable(self) -> Speculation:
        """What was known before the first step: plans from it depend on no clock and no history."""
        return Speculation(LiveCosts(self.costs.curve, learns=False), self.acceptance.fresh())


class AutoPlanner:
    """Plans each step for the most tokens a millisecond.

    Args:
        known: what steps cost and how drafts hold; it goes on learning.
        num_draft_tokens: k; 0 never drafts with masks.
        use_lookup: whether drafts may come from suffix lookup.
    """

    def __init__(
        self, known: Speculation, *, num_draft_tokens: int, use_lookup: bool = True
    ) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.uses_lookup = use_lookup
        self._costs = known.costs
        self._acceptance = known.acceptance
        self._lookup = known.lookup
        self._policy: Policy | None = None
        self._num_steps = 0
        self._plain_steps = 0
        self._pause = FIRST_PAUSE
        self._probe_waits = False

    def plan(
        self,
        *,
        num_pending: int,
        num_waiting: int,
        room: int,
        context: int = 0,
        num_found: int = 0,
        match: int = 0,
    ) -> Decision:
        """Plan one step.

        Args:
            num_pending: ordinary rows that must be in it.
            num_waiting: drafts that could be verified.
            room: tokens that may still be emitted, at least 1; drafts beyond it are useless.
            context: ids in the cache.
            num_found: drafts that suffix lookup has found.
            match: ids that matched for them.
        """
        self._refresh(context)
        assert self._policy is not None
        policy, k = self._policy, self.num_draft_tokens
        waiting = min(num_waiting, k, room - 1)
        best, is_probe = policy.plans[waiting], False
        if self._probe_waits and waiting:
            best, is_probe = _all_of(best, waiting), True
        elif k and not any(best.mask_counts) and self._plain_steps >= self._pause:
            best, is_probe = StepPlan(0, (min(PROBE_MASKS, k),)), True
        source = MASK if best.num_draft_tokens else ""
        holds = self._holds
        found = min(num_found, LONGEST_LOOKUP, room - 1, len(self._forward) - 2)
        if found > 0 and num_pending == 1 and not is_probe:
            chances = self._lookup.holds(match, found)
            longer = self._lookup_plan(policy, chances, float(policy.values[waiting]))
            if longer is not None:
                best, source, holds = longer, LOOKUP, chances
        return self._decide(best, num_pending, room, source=source, is_probe=is_probe, holds=holds)

    def observe(
        self, decision: Decision, *, num_accepted: int, context: int, ms: float, match: int = 0
    ) -> None:
        """Learn from a step that ran.

        Args:
            decision: what ``plan`` said.
            num_accepted: drafts that held, whether they were emitted or not.
            context: ids in the cache before the step.
            ms: what the step took.
            match: as given to ``plan``.
        """
        layout = decision.layout
        drafts, largest = layout.num_draft_tokens, max(layout.mask_counts)
        if layout.num_pending == 1:
            self._costs.observe(rows=layout.num_rows, largest_group=largest, context=context, ms=ms)
        if decision.source == LOOKUP:
            self._lookup.observe(match, drafts, num_accepted)
        elif drafts:
            self._acceptance.observe(drafts, num_accepted)
        self._num_steps += 1
        self._keep_probing(decision, drafts, largest)

    def _keep_probing(self, decision: Decision, drafts: int, largest: int) -> None:
        """Count plain steps; a probe is a step with masks and the step that verifies its drafts."""
        if decision.is_probe and largest and not drafts:
            self._probe_waits = True
        elif decision.is_probe:
            self._probe_waits, self._plain_steps = False, 0
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._num_steps = -(-self._num_steps // REFRESH_STEPS) * REFRESH_STEPS  # look now
        elif largest or decision.source == MASK:
            self._plain_steps, self._pause = 0, FIRST_PAUSE
        else:
            self._plain_steps += 1

    def _refresh(self, context: int) -> None:
        is_due = self._num_steps % REFRESH_STEPS == 0 or self._num_steps in EARLY_REFRESH
        if self._policy is not None and not is_due:
            return
        self._holds = self._acceptance.holds(self.num_draft_tokens)
        self._forward = self._costs.forward_ms(context)
        self._draft = self._costs.draft_ms(self.num_draft_tokens)
        rounds = MOST_ROUNDS if self._num_steps < REFRESH_STEPS else 2
        self._policy = best_policy(
            self._holds, self._forward, self._draft, start=self._policy, rounds=rounds
        )

    def _lookup_plan(self, policy: Policy, chances: np.ndarray, least: float) -> StepPlan | None:
        """The best number of looked-up drafts, with no masks or some behind the last of them."""
        counts = np.arange(1, len(chances))
        emitted, whole = np.cumsum(chances)[1:], chances[1:]
        best = None
        for masks in {0, max(policy.plans[0].mask_counts)}:
            rows = 1 + counts + masks
            fits = rows < len(self._forward)
            ms = self._forward[np.minimum(rows, len(self._forward) - 1)] + self._draft[masks]
            later = (1 - FORGET) * whole * policy.values[masks]
            value = np.where(fits, emitted + later - policy.rate * ms, -np.inf)
            at = int(value.argmax())
            if value[at] > least + 1e-9:
                least, best = float(value[at]), (at + 1, masks)
        return best and StepPlan(best[0], (0,) * best[0] + (best[1],))

    def _decide(
        self,
        plan: StepPlan,
        num_pending: int,
        room: int,
        *,
        source: str,
        is_probe: bool,
        holds: np.ndarray,
    ) -> Decision:
        useful = [max(0, min(c, room - 2 - at)) for at, c in enumerate(plan.mask_counts)]
        plan = StepPlan(plan.num_draft_tokens, tuple(useful))
        known = plan.num_rows < len(self._forward)
        return Decision(
            layout=_layout(num_pending, plan),
            source=source,
            is_probe=is_probe,
            expected_tokens=expected_tokens(holds, plan.num_draft_tokens),
            expected_ms=step_ms(plan, self._forward, self._draft) if known else float("nan"),
            plain_ms=float(self._forward[1]),
        )


def _all_of(plan: StepPlan, waiting: int) -> StepPlan:
    """A plan that verifies all waiting drafts, as far as possible with the same masks."""
    counts = (*plan.mask_counts, *(0,) * waiting)[: waiting + 1]
    return StepPlan(waiting, counts)


@lru_cache(maxsize=512)
def _layout(num_pending: int, plan: StepPlan) -> StepLayout:
    return StepLayout(num_pending, plan.num_draft_tokens, plan.mask_counts)
