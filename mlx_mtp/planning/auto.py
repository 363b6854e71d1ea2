"""The planner behind ``auto``: spends rows where drafts are likely to hold, where rows are cheap.

It knows what steps cost here (``LiveCosts``) and how drafts have held so far (``Acceptance``), and
follows the best rule for both (``policy``).  Every few steps it looks whether they have moved, and
works the rule out anew if so.  Where plain decoding wins, nothing is drafted; now and then two
masks are tried again (``probing``).  Drafts found by suffix lookup take a step whenever they are
worth more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.acceptance import UNKNOWN, Acceptance
from mlx_mtp.planning.costs import UNMEASURED, CostCurve, LiveCosts, shared_ms
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS, LookupAcceptance
from mlx_mtp.planning.plan import LOOKUP, MASK, Plan
from mlx_mtp.planning.policy import (
    FORGET,
    MOST_ROUNDS,
    Policy,
    StepPlan,
    best_policy,
    expected_tokens,
    step_ms,
)
from mlx_mtp.planning.probing import Probing

LOOK_STEPS = 32  # steps between two looks for the best rule
EARLY_LOOKS = (2, 4, 8, 16)  # more looks while little is known
MOVED = 0.05  # chances, or costs in plain steps, that moved by less leave the rule as it is
PROBE_MASKS = 2


@dataclass
class Rule:
    """The best rule, what it was worked out for, and what it decided so far."""

    policy: Policy
    holds: np.ndarray  # [k + 1]
    forward_ms: np.ndarray  # [R + 1]
    draft_ms: np.ndarray  # [k + 1]
    decisions: dict[tuple[int, int, int, bool], Plan] = field(default_factory=dict)

    def still_fits(self, holds: np.ndarray, forward_ms: np.ndarray, draft_ms: np.ndarray) -> bool:
        """Whether little has moved since; what is best hardly changes with it."""
        if holds.shape != self.holds.shape or np.abs(holds - self.holds).max() > MOVED:
            return False
        moved = np.abs(forward_ms - self.forward_ms).max()
        moved = max(moved, np.abs(draft_ms - self.draft_ms).max())
        return bool(moved <= MOVED * self.forward_ms[1])

    @cached_property
    def try_cost(self) -> float:
        """Plain steps that a try takes more than it brings; endless if its rows are unknown."""
        masks = min(PROBE_MASKS, len(self.holds) - 1)
        if masks + 1 >= len(self.forward_ms):
            return math.inf
        ms = 2 * self.forward_ms[masks + 1] + self.draft_ms[masks]
        return float(ms / self.forward_ms[1]) - 1 - expected_tokens(self.holds, masks)


@dataclass
class Speculation:
    """What a model's planner knows, from one answer to the next.

    Attributes:
        costs: what steps cost here.
        acceptance: how the adapter's drafts hold.
        lookup: how looked-up drafts hold.
        probing: when drafts are tried again where plain decoding wins.
        rules: the best rules so far, by how many answers share steps.
        sharers: how many answers shared the last steps; each pays its part of the rows of all.
        num_steps: steps observed so far.
        may_measure: whether costs may be measured again if steps disprove them.
        num_remeasured: how often that was done.
    """

    costs: LiveCosts
    acceptance: Acceptance
    lookup: LookupAcceptance = field(default_factory=LookupAcceptance)
    probing: Probing = field(default_factory=Probing)
    rules: dict[int, Rule] = field(default_factory=dict)
    sharers: int = 1
    num_steps: int = 0
    may_measure: bool = False
    num_remeasured: int = 0

    @classmethod
    def guess(cls, num_draft_tokens: int) -> Speculation:
        """Where nothing is known yet."""
        acceptance = Acceptance([UNKNOWN] * max(num_draft_tokens, 1))
        return cls(LiveCosts(UNMEASURED), acceptance)

    def take_costs(self, curve: CostCurve) -> None:
        """Go on with costs that were measured again; what is known of drafts stays."""
        self.costs, self.rules = LiveCosts(curve), {}
        self.num_remeasured += 1

    def repeatable(self) -> Speculation:
        """What was known before the first step: plans from it depend on no clock and no history."""
        return Speculation(LiveCosts(self.costs.curve, learns=False), self.acceptance.fresh())


class AutoPlanner:
    """Plans each step of one answer for the most tokens a millisecond.

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
        self._known = known
        self._lookup = known.lookup.in_text()
        known.probing.waits = False  # the drafts of an answer that ended are gone
        self._rule: Rule | None = None
        self._sharers = 1
        self._look_at = 0  # the step before which to look for a better rule

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
        """Plan one step.

        Args:
            num_pending: ordinary rows that must be in it.
            num_waiting: drafts that could be verified.
            room: tokens that may still be emitted, at least 1; drafts beyond it are useless.
            context: ids in the cache.
            num_lookup: drafts that suffix lookup proposes.
            match: ids that matched for them.
        """
        rule = self._best_rule(context)
        waiting = min(num_waiting, self.num_draft_tokens, room - 1)
        is_probe = self._is_probe(rule, waiting, room)
        if num_lookup and num_pending == 1 and not is_probe:
            decision = self._looked_up(rule, waiting, room, num_lookup, match)
            if decision is not None:
                return decision
        key = (waiting, num_pending, min(room, 2 * self.num_draft_tokens + 2), is_probe)
        if (decision := rule.decisions.get(key)) is None:
            decision = self._by_rule(rule, waiting, num_pending, room, is_probe)
            if num_pending == 1:  # prompts differ too much for theirs to come again
                rule.decisions[key] = decision
        return decision

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
        """Learn from a step that ran.

        Args:
            plan: what ``plan`` returned.
            num_accepted: drafts that held, whether they were emitted or not.
            context: ids in the cache before the step.
            ms: what the step took; NaN where other answers' ran with it, which says nothing of one.
            match: as given to ``plan``.
            num_judged: looked-up ids, verified or not, that the emitted ones tell of.
            num_right: how many of these from the first on were emitted.
        """
        layout, known = plan.layout, self._known
        drafts, largest = layout.num_draft_tokens, max(layout.mask_counts)
        of_expected = 1.0
        if layout.num_pending == 1 and not math.isnan(ms):
            of_expected = known.costs.observe(
                rows=layout.num_rows, largest_group=largest, context=context, ms=ms
            )
        self._lookup.observe(match, num_judged, num_right)
        if plan.source == LOOKUP:
            drafts = 0
        elif drafts:
            known.acceptance.observe(drafts, num_accepted)
        known.num_steps += 1
        ended = known.probing.observe(
            is_probe=plan.is_probe,
            masks=largest,
            drafts=drafts,
            num_accepted=num_accepted,
            of_expected=of_expected,
        )
        if ended or known.num_steps in EARLY_LOOKS:
            self._look_at = known.num_steps

    def _best_rule(self, context: int) -> Rule:
        """The rule for what is known now, looked for every few steps."""
        known, k, sharers = self._known, self.num_draft_tokens, self._known.sharers
        looked = known.num_steps < self._look_at and self._sharers == sharers
        if self._rule is not None and looked:
            return self._rule
        self._look_at, self._sharers = known.num_steps + LOOK_STEPS, sharers
        holds, draft = known.acceptance.holds(k), known.costs.draft_ms(k)
        forward = shared_ms(known.costs.forward_ms(context), sharers)
        rule = known.rules.get(sharers)
        if rule is None or not rule.still_fits(holds, forward, draft):
            start = rule.policy if rule else None
            rounds = MOST_ROUNDS if known.num_steps < LOOK_STEPS else 1
            policy = best_policy(holds, forward, draft, start=start, rounds=rounds)
            rule = Rule(policy, holds, forward, draft)
        self._rule = known.rules[sharers] = rule
        return rule

    def _is_probe(self, rule: Rule, waiting: int, room: int) -> bool:
        """Whether the next step is one of a try."""
        probing = self._known.probing
        if probing.waits and waiting:
            return True
        masks = min(PROBE_MASKS, self.num_draft_tokens)
        if not masks or waiting or room < masks + 2 or not probing.may_be_due:
            return False
        if any(rule.policy.plans[0].mask_counts) or math.isinf(rule.try_cost):
            return False
        return probing.is_due(rule.try_cost)

    def _by_rule(
        self, rule: Rule, waiting: int, num_pending: int, room: int, is_probe: bool
    ) -> Plan:
        """The rule's step, or one of a try."""
        plan = rule.policy.plans[waiting]
        if is_probe:
            masks = min(PROBE_MASKS, self.num_draft_tokens)
            plan = _all_of(plan, waiting) if waiting else StepPlan(0, (masks,))
        source = MASK if plan.num_draft_tokens else ""
        return _decide(
            plan, rule, num_pending, room, source=source, holds=rule.holds, is_probe=is_probe
        )

    def _looked_up(
        self, rule: Rule, waiting: int, room: int, num_lookup: int, match: int
    ) -> Plan | None:
        """A step with looked-up drafts, if they are worth more than what waits."""
        found = min(num_lookup, MAX_LOOKUP_TOKENS, room - 1, len(rule.forward_ms) - 2)
        if found < 1:
            return None
        chances = self._lookup.accept_probs(match, found)
        plan = self._lookup_plan(rule, chances, float(rule.policy.values[waiting]))
        return plan and _decide(plan, rule, 1, room, source=LOOKUP, holds=chances)

    def _lookup_plan(self, rule: Rule, chances: np.ndarray, least: float) -> StepPlan | None:
        """The best number of looked-up drafts, with no masks or some behind the last of them."""
        counts = np.arange(1, len(chances))
        emitted, whole = np.cumsum(chances)[1:], chances[1:]
        policy, forward, best = rule.policy, rule.forward_ms, None
        for masks in {0, max(policy.plans[0].mask_counts)}:
            rows = 1 + counts + masks
            fits = rows < len(forward)
            ms = forward[np.minimum(rows, len(forward) - 1)] + rule.draft_ms[masks]
            later = (1 - FORGET) * whole * policy.values[masks]
            value = np.where(fits, emitted + later - policy.rate * ms, -np.inf)
            at = int(value.argmax())
            if value[at] > least + 1e-9:
                least, best = float(value[at]), (at + 1, masks)
        return best and StepPlan(best[0], (0,) * best[0] + (best[1],))


def _decide(
    plan: StepPlan,
    rule: Rule,
    num_pending: int,
    room: int,
    *,
    source: str,
    holds: np.ndarray,
    is_probe: bool = False,
) -> Plan:
    """A plan as a decision, without masks whose drafts could never be emitted."""
    useful = [max(0, min(c, room - 2 - at)) for at, c in enumerate(plan.mask_counts)]
    plan = StepPlan(plan.num_draft_tokens, tuple(useful))
    known = plan.num_rows < len(rule.forward_ms)
    return Plan(
        layout=_layout(num_pending, plan),
        source=source,
        is_probe=is_probe,
        expected_tokens=expected_tokens(holds, plan.num_draft_tokens),
        expected_ms=step_ms(plan, rule.forward_ms, rule.draft_ms) if known else float("nan"),
        plain_ms=float(rule.forward_ms[1]),
    )


def _all_of(plan: StepPlan, waiting: int) -> StepPlan:
    """A plan that verifies all waiting drafts, as far as possible with the same masks."""
    counts = (*plan.mask_counts, *(0,) * waiting)[: waiting + 1]
    return StepPlan(waiting, counts)


@lru_cache(maxsize=512)
def _layout(num_pending: int, plan: StepPlan) -> StepLayout:
    return StepLayout(num_pending, plan.num_draft_tokens, plan.mask_counts)
