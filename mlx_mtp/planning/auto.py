"""The planner of layout ``auto``: the most tokens per millisecond on this machine.

It knows what steps cost here (``LiveCosts``) and how often drafts have been accepted
(``Acceptance``), and follows the best policy for both (``policy``).  Every few steps it compares
both with the numbers that the policy was computed for, and computes it again if they have moved.
Where plain decoding wins nothing is drafted, except for a probe now and then (``probing``).
Looked-up drafts are verified whenever that is worth more than what the policy does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.costs import GPU_GUESS, CostCurve, LiveCosts, shared_ms
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS, LookupAcceptance
from mlx_mtp.planning.plan import LOOKUP, MASK, Plan
from mlx_mtp.planning.policy import (
    MAX_ROUNDS,
    PLAIN,
    RESET_PROB,
    Action,
    Policy,
    best_policy,
    expected_tokens,
    step_ms,
)
from mlx_mtp.planning.probing import Probing
from mlx_mtp.planning.settings import DEFAULTS, PlannerSettings


@dataclass
class PricedPolicy:
    """The best policy, the numbers that it was computed for, and the plans made by it so far."""

    policy: Policy
    prefix_probs: np.ndarray  # [k + 1]
    forward_ms: np.ndarray  # [R + 1]
    draft_ms: np.ndarray  # [k + 1]
    plans: dict[tuple[int, int, int, bool], Plan] = field(default_factory=dict)

    def still_fits(
        self,
        prefix_probs: np.ndarray,
        forward_ms: np.ndarray,
        draft_ms: np.ndarray,
        *,
        tolerance: float,
    ) -> bool:
        """Whether no probability, and no cost in plain steps, has moved by more than this."""
        if prefix_probs.shape != self.prefix_probs.shape:
            return False
        if np.abs(prefix_probs - self.prefix_probs).max() > tolerance:
            return False
        moved = np.abs(forward_ms - self.forward_ms).max()
        moved = max(moved, np.abs(draft_ms - self.draft_ms).max())
        return bool(moved <= tolerance * self.forward_ms[1])

    @cached_property
    def num_probe_masks(self) -> int:
        """Masks of a probe."""
        return min(DEFAULTS.probe_masks, len(self.prefix_probs) - 1)

    @cached_property
    def probe_cost(self) -> float:
        """Plain steps that a probe loses on average; infinite if its cost is unknown."""
        masks = self.num_probe_masks
        if masks + 1 >= len(self.forward_ms):
            return math.inf
        ms = 2 * self.forward_ms[masks + 1] + self.draft_ms[masks]
        return float(ms / self.forward_ms[1]) - 1 - expected_tokens(self.prefix_probs, masks)


@dataclass
class Speculation:
    """What the planner of a model knows, from one answer to the next.

    Attributes:
        costs: costs of steps on this machine.
        acceptance: acceptance of the adapter's drafts.
        lookup: acceptance of looked-up drafts.
        probing: when to try drafting where plain decoding wins.
        policies: the best policies so far, by the number of answers that share steps.
        sharers: number of answers that shared the last steps; each pays its part of all rows.
        num_steps: steps observed so far.
        num_stored_steps: steps whose effect on ``costs`` is stored for the next start.
    """

    costs: LiveCosts
    acceptance: Acceptance
    lookup: LookupAcceptance = field(default_factory=LookupAcceptance)
    probing: Probing = field(default_factory=Probing)
    policies: dict[int, PricedPolicy] = field(default_factory=dict)
    sharers: int = 1
    num_steps: int = 0
    num_stored_steps: int = 0

    @classmethod
    def guess(cls, num_draft_tokens: int) -> Speculation:
        """Default estimates for a single answer; skips the initial plain steps."""
        guess = replace(GPU_GUESS, is_guess=False)
        return cls(LiveCosts(guess), Acceptance.unknown(num_draft_tokens))

    def replace_costs(self, curve: CostCurve) -> None:
        """Start again from other costs; acceptance estimates stay."""
        self.costs, self.policies, self.num_stored_steps = LiveCosts(curve), {}, 0

    def repeatable(self) -> Speculation:
        """A copy as before the first step, whose plans depend on no clock and no history."""
        return Speculation(LiveCosts(self.costs.curve, learns=False), self.acceptance.fresh())


class AutoPlanner:
    """Plans each step of one answer for the most tokens per millisecond.

    Args:
        known: costs and acceptance, which keep learning.
        num_draft_tokens: k; 0 drafts no tokens with masks.
        use_lookup: whether drafts may come from suffix lookup.
        settings: when to look for a better policy.
    """

    def __init__(
        self,
        known: Speculation,
        *,
        num_draft_tokens: int,
        use_lookup: bool = True,
        settings: PlannerSettings = DEFAULTS,
    ) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.uses_lookup = use_lookup
        self._known = known
        self._settings = settings
        self._lookup = known.lookup.in_text()
        known.probing.is_verifying = False  # the drafts of an answer that ended are gone
        self._policy: PricedPolicy | None = None
        self._sharers = 1
        self._replan_at = 0  # the step before which to look for a better policy

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
        priced = self._best_policy(context)
        may_set_pace = num_pending == 1 and self._known.sharers == 1
        if may_set_pace and self._known.costs.needs_plain_steps:
            probs = priced.prefix_probs
            return _make_plan(PLAIN, priced, 1, room, source="", prefix_probs=probs)
        waiting = min(num_waiting, self.num_draft_tokens, room - 1)
        is_probe = self._is_probe(priced, waiting, room)
        if num_lookup and num_pending == 1 and not is_probe:
            plan = self._lookup_plan(priced, waiting, room, num_lookup, match)
            if plan is not None:
                return plan
        key = (waiting, num_pending, min(room, 2 * self.num_draft_tokens + 2), is_probe)
        if (plan := priced.plans.get(key)) is None:
            plan = self._policy_plan(priced, waiting, num_pending, room, is_probe)
            if num_pending == 1:  # prompts differ too much for their plans to be used again
                priced.plans[key] = plan
        return plan

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
            num_accepted: accepted drafts, whether they were emitted or not.
            context: ids in the cache before the step.
            ms: duration; NaN in a batch, where it says nothing about one answer's rows.
            match: as given to ``plan``.
            num_judged: looked-up ids, verified or not, that can be compared with emitted ids.
            num_right: length of their prefix that was emitted.
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
        probe_ended = known.probing.observe(
            is_probe=plan.is_probe,
            masks=largest,
            drafts=drafts,
            num_accepted=num_accepted,
            of_expected=of_expected,
        )
        if probe_ended or known.num_steps in self._settings.early_replans:
            self._replan_at = known.num_steps

    def _best_policy(self, context: int) -> PricedPolicy:
        """The policy for what is known now, which is looked at again every few steps."""
        known, k, sharers = self._known, self.num_draft_tokens, self._known.sharers
        is_recent = known.num_steps < self._replan_at and self._sharers == sharers
        if self._policy is not None and is_recent:
            return self._policy
        settings = self._settings
        self._replan_at, self._sharers = known.num_steps + settings.replan_steps, sharers
        probs, draft_ms = known.acceptance.prefix_probs(k), known.costs.draft_ms(k)
        forward_ms = shared_ms(known.costs.forward_ms(context), sharers)
        priced = known.policies.get(sharers)
        if priced is None or not priced.still_fits(
            probs, forward_ms, draft_ms, tolerance=settings.moved
        ):
            start = priced.policy if priced else None
            rounds = MAX_ROUNDS if known.num_steps < settings.replan_steps else 1
            policy = best_policy(probs, forward_ms, draft_ms, start=start, max_rounds=rounds)
            priced = PricedPolicy(policy, probs, forward_ms, draft_ms)
        self._policy = known.policies[sharers] = priced
        return priced

    def _is_probe(self, priced: PricedPolicy, waiting: int, room: int) -> bool:
        """Whether the next step is one of a probe."""
        probing, masks = self._known.probing, priced.num_probe_masks
        if probing.is_verifying and waiting:
            return True
        if not masks or waiting or room < masks + 2 or not probing.may_be_due:
            return False
        if any(priced.policy.actions[0].mask_counts) or math.isinf(priced.probe_cost):
            return False
        return probing.is_due(priced.probe_cost)

    def _policy_plan(
        self, priced: PricedPolicy, waiting: int, num_pending: int, room: int, is_probe: bool
    ) -> Plan:
        """The policy's step, or one of a probe."""
        action = priced.policy.actions[waiting]
        if is_probe and waiting:
            action = _verify_all(action, waiting)
        elif is_probe:
            action = Action(0, (priced.num_probe_masks,))
        source = MASK if action.num_draft_tokens else ""
        return _make_plan(
            action, priced, num_pending, room,
            source=source, prefix_probs=priced.prefix_probs, is_probe=is_probe,
        )  # fmt: skip

    def _lookup_plan(
        self, priced: PricedPolicy, waiting: int, room: int, num_lookup: int, match: int
    ) -> Plan | None:
        """A step with looked-up drafts if it is worth more than the drafts that wait."""
        max_drafts = min(num_lookup, MAX_LOOKUP_TOKENS, room - 1, len(priced.forward_ms) - 2)
        if max_drafts < 1:
            return None
        probs = self._lookup.prefix_probs(match, max_drafts)
        action = _best_lookup(priced, probs, value_to_beat=float(priced.policy.values[waiting]))
        if action is None:
            return None
        return _make_plan(action, priced, 1, room, source=LOOKUP, prefix_probs=probs)


def _best_lookup(
    priced: PricedPolicy, prefix_probs: np.ndarray, *, value_to_beat: float
) -> Action | None:
    """The best number of looked-up drafts, without masks or with some after the last draft."""
    counts = np.arange(1, len(prefix_probs))
    emitted, all_accepted = np.cumsum(prefix_probs)[1:], prefix_probs[1:]
    policy, forward_ms, best = priced.policy, priced.forward_ms, None
    for masks in {0, max(policy.actions[0].mask_counts)}:
        rows = 1 + counts + masks
        ms = forward_ms[np.minimum(rows, len(forward_ms) - 1)] + priced.draft_ms[masks]
        later = (1 - RESET_PROB) * all_accepted * policy.values[masks]
        values = np.where(rows < len(forward_ms), emitted + later - policy.rate * ms, -np.inf)
        index = int(values.argmax())
        if values[index] > value_to_beat + 1e-9:
            value_to_beat, best = float(values[index]), (index + 1, masks)
    return best and Action(best[0], (0,) * best[0] + (best[1],))


def _make_plan(
    action: Action,
    priced: PricedPolicy,
    num_pending: int,
    room: int,
    *,
    source: str,
    prefix_probs: np.ndarray,
    is_probe: bool = False,
) -> Plan:
    """An action as a plan, without masks whose drafts could never be emitted."""
    useful = [max(0, min(c, room - 2 - anchor)) for anchor, c in enumerate(action.mask_counts)]
    action = Action(action.num_draft_tokens, tuple(useful))
    is_priced = action.num_rows < len(priced.forward_ms)
    return Plan(
        layout=_layout(num_pending, action),
        source=source,
        is_probe=is_probe,
        expected_tokens=expected_tokens(prefix_probs, action.num_draft_tokens),
        expected_ms=step_ms(action, priced.forward_ms, priced.draft_ms) if is_priced else math.nan,
        plain_ms=float(priced.forward_ms[1]),
    )


def _verify_all(action: Action, waiting: int) -> Action:
    """An action that verifies all waiting drafts, as far as possible with the same masks."""
    counts = (*action.mask_counts, *(0,) * waiting)[: waiting + 1]
    return Action(waiting, counts)


@lru_cache(maxsize=512)
def _layout(num_pending: int, action: Action) -> StepLayout:
    return StepLayout(num_pending, action.num_draft_tokens, action.mask_counts)
