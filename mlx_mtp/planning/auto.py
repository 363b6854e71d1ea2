"""The planner of layout ``auto``: the most tokens per millisecond on this machine.

It knows what steps cost here (``LiveCosts``) and how often drafts have been accepted
(``Acceptance``), and follows the best policy for both (``policy``).  Every few steps it compares
both with the numbers that the policy was computed for, and computes it again if they have moved.
Where plain decoding wins nothing is drafted, except for a probe now and then (``probing``).

Drafters without mask rows make offers for one step at a time.  An offer is taken where its drafts
are worth more than the policy's step (``options``), and probed now and then where not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.costs import GPU_GUESS, CostCurve, LiveCosts, shared_ms
from mlx_mtp.planning.estimates import Estimates
from mlx_mtp.planning.lookup import LookupAcceptance
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.options import (
    Option,
    PricedOffer,
    Prices,
    chain_option,
    offer_option,
    tree_option,
)
from mlx_mtp.planning.plan import MASK, Plan
from mlx_mtp.planning.policy import (
    MAX_ROUNDS,
    PLAIN,
    Action,
    Policy,
    best_policy,
    expected_tokens,
    step_ms,
)
from mlx_mtp.planning.probing import Probing
from mlx_mtp.planning.settings import DEFAULTS, PlannerSettings
from mlx_mtp.planning.tree_acceptance import TreeAcceptance


@dataclass
class PricedPolicy:
    """The best policy, the numbers that it was computed for, and the plans made by it so far."""

    policy: Policy
    prefix_probs: np.ndarray  # [k + 1]
    forward_ms: np.ndarray  # [R + 1]
    draft_ms: np.ndarray  # [k + 1]
    plain_ms: float  # of a step that no other answer shares
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
        tree: acceptance of the nodes of trees of mask drafts.
        drafters: estimates for the other drafters without mask rows, by source.
        probing: when to try drafting where plain decoding wins.
        policies: the best policies so far, by the number of answers that share steps.
        sharers: number of answers that shared the last steps; each pays its part of all rows.
        num_steps: steps observed so far.
        num_stored_steps: steps whose effect on ``costs`` is stored for the next start.
    """

    costs: LiveCosts
    acceptance: Acceptance
    lookup: LookupAcceptance = field(default_factory=LookupAcceptance)
    tree: TreeAcceptance = field(default_factory=TreeAcceptance)
    drafters: dict[str, Estimates] = field(default_factory=dict)
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

    def with_row_budget(self, max_rows: int) -> Speculation:
        """The same acceptance, with steps that all cost the same up to a number of rows.

        The best policy then emits the most tokens per step.
        """
        rows = tuple(sorted({1, max_rows}))
        curve = CostCurve(
            rows=rows, contexts=(0,), forward_ms=((1.0,) * len(rows),), draft_ms=(0.0,)
        )
        return Speculation(
            LiveCosts(curve, learns=False),
            self.acceptance,
            lookup=self.lookup,
            tree=self.tree,
            # What they cost is learned from times.
            drafters={source: known.fresh() for source, known in self.drafters.items()},
        )

    def repeatable(self) -> Speculation:
        """A copy as before the first step, whose plans depend on no clock and no history."""
        costs = LiveCosts(self.costs.curve, learns=False)
        drafters = {source: known.fresh() for source, known in self.drafters.items()}
        return Speculation(costs, self.acceptance.fresh(), drafters=drafters)

    def estimates(self, offer: Offer) -> Estimates:
        """What is known about the drafter of an offer."""
        if (known := self.drafters.get(offer.source)) is None:
            known = self.drafters[offer.source] = Estimates.unknown()
        return known


class AutoPlanner:
    """Plans each step of one answer for the most tokens per millisecond.

    Args:
        known: costs and acceptance, which keep learning.
        num_draft_tokens: k; 0 drafts no tokens with masks.
        settings: when to look for a better policy.
    """

    def __init__(
        self,
        known: Speculation,
        *,
        num_draft_tokens: int,
        settings: PlannerSettings = DEFAULTS,
    ) -> None:
        self.num_draft_tokens = num_draft_tokens
        self._known = known
        self._settings = settings
        known.probing.is_verifying = False  # the drafts of an answer that ended are gone
        self._policy: PricedPolicy | None = None
        self._sharers = 1
        self._replan_at = 0  # the step before which to look for a better policy

    def plan(
        self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), context: int = 0
    ) -> Plan:
        """Plan one step.

        Args:
            num_pending: ordinary rows that must be in it.
            room: tokens that may still be emitted, at least 1; drafts beyond it are useless.
            offers: what drafters could propose; that of mask tokens is the drafts that wait.
            context: ids in the cache.
        """
        priced = self._best_policy(context)
        may_set_pace = num_pending == 1 and self._known.sharers == 1
        if may_set_pace and self._known.costs.needs_plain_steps:
            return _make_plan(PLAIN, priced, 1, room, source="", prefix_probs=priced.prefix_probs)
        num_waiting = next((offer.num_drafts for offer in offers if offer.source == MASK), 0)
        waiting = min(num_waiting, self.num_draft_tokens, room - 1)
        is_probe = self._is_probe(priced, waiting, room)
        if num_pending == 1 and not is_probe:
            option = self._best_option(priced, offers, waiting, room)
            if option is not None:
                return _make_plan(
                    option.action, priced, 1, room,
                    source=option.source, num_first=option.num_first, is_probe=option.is_probe,
                    prefix_probs=option.prefix_probs, proposal_ms=option.proposal_ms,
                    nodes=option.nodes, parents=option.parents,
                )  # fmt: skip
        key = (waiting, num_pending, min(room, 2 * self.num_draft_tokens + 2), is_probe)
        if (plan := priced.plans.get(key)) is None:
            plan = self._policy_plan(priced, waiting, num_pending, room, is_probe)
            if num_pending == 1:  # prompts differ too much for their plans to be used again
                priced.plans[key] = plan
        return plan

    def observe(self, plan: Plan, *, last_node: int, context: int, ms: float) -> None:
        """Learn from a step that ran.

        Args:
            plan: what ``plan`` returned.
            last_node: the last accepted draft, counted from 1, or 0; emitted or not.
            context: ids in the cache before the step.
            ms: duration; NaN in a batch, where it says nothing about one answer's rows.
        """
        layout, known = plan.layout, self._known
        largest, of_expected, share = max(layout.mask_counts), 1.0, 0.0
        if layout.num_pending == 1 and not math.isnan(ms):
            proposer = known.drafters.get(plan.source)
            of_expected = known.costs.observe(
                rows=layout.num_rows, largest_group=largest, context=context, ms=ms,
                proposal_ms=plan.proposal_ms,
                is_proposal_new=plan.proposal_ms > 0 and proposer is not None
                and proposer.is_cost_new,
            )  # fmt: skip
            share = plan.proposal_ms / plan.expected_ms if known.costs.knows_pace else 0.0
        num_accepted, drafts = int(layout.depths[last_node]), dict(plan.parts)
        num_mask = drafts.get(MASK, 0)
        num_mask_accepted = min(num_accepted, num_mask)
        if num_mask and plan.nodes is None:  # the drafter judges its trees
            known.acceptance.observe(num_mask, num_mask_accepted)
        for source, estimates in known.drafters.items():
            estimates.observe(
                drafts.get(source, 0), num_accepted, of_expected=of_expected, share=share,
                is_probe=plan.is_probe and plan.source == source,
            )  # fmt: skip
        known.num_steps += 1
        probe_ended = known.probing.observe(
            is_probe=plan.is_probe and plan.source in ("", MASK),
            masks=largest,
            drafts=num_mask,
            num_accepted=num_mask_accepted,
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
        alone_ms = known.costs.forward_ms(context)
        forward_ms = shared_ms(alone_ms, sharers)
        priced = known.policies.get(sharers)
        if priced is None or not priced.still_fits(
            probs, forward_ms, draft_ms, tolerance=settings.moved
        ):
            start = priced.policy if priced else None
            rounds = MAX_ROUNDS if known.num_steps < settings.replan_steps else 1
            policy = best_policy(probs, forward_ms, draft_ms, start=start, max_rounds=rounds)
            priced = PricedPolicy(policy, probs, forward_ms, draft_ms, float(alone_ms[1]))
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

    def _best_option(
        self, priced: PricedPolicy, offers: Sequence[Offer], waiting: int, room: int
    ) -> Option | None:
        """The best step with a tree, or with drafts of an offer if that is worth more than the
        policy's step.
        """
        limit = min(room - 1, len(priced.forward_ms) - 2)
        known = [
            self._priced_offer(priced, offer, min(offer.num_drafts, limit - offer.follows))
            for offer in offers
            if offer.source != MASK
            and min(offer.num_drafts, limit - offer.follows) > 0
            and not self._waits_for_pace(offer)
        ]
        tree = next((offer.tree for offer in offers if offer.tree is not None), None)
        if not known and tree is None:
            return None
        # What is offered in every step can be relied on in the long run.
        steady = [each for each in known if each.offer.prefix_probs is None]
        rates = [each.rate(priced.forward_ms) for each in steady]
        rate = max([priced.policy.rate, *rates])
        prices = Prices(priced.policy, priced.forward_ms, priced.draft_ms, rate)
        best, value = None, prices.policy_value(waiting) + 1e-9
        if tree is not None and waiting:
            # The policy's step is one of those that a tree allows, and its value that of the
            # average step, while the tree's is that of the drafts at hand.
            best = tree_option(tree, prices, room=room)
            value = best.value
        for each in known:
            if each.offer.follows:
                option = chain_option(each, prices, priced.prefix_probs, waiting)
            else:
                option = offer_option(each, prices)
            if option is not None and option.value > value:
                best, value = option, option.value
        for each in steady:
            if best is None or best.source != each.offer.source:
                estimates = self._known.estimates(each.offer)
                if probe := estimates.probe(each, prices):
                    return probe
        return best

    def _waits_for_pace(self, offer: Offer) -> bool:
        """Whether the cost of proposing is unknown, and the pace that would show it as well."""
        known = self._known
        if offer.prefix_probs is not None or known.sharers > 1 or known.costs.knows_pace:
            return False
        return offer.first_cost > 0 and known.estimates(offer).is_cost_new

    def _priced_offer(self, priced: PricedPolicy, offer: Offer, count: int) -> PricedOffer:
        """An offer of up to ``count`` drafts with what is known about its drafter."""
        if offer.prefix_probs is not None:
            return PricedOffer(offer, offer.prefix_probs[: count + 1], np.zeros(count + 1))
        estimates = self._known.estimates(offer)
        probs = estimates.acceptance.prefix_probs(count)
        return PricedOffer(offer, probs, estimates.draft_ms(offer, count, priced.plain_ms))


def _make_plan(
    action: Action,
    priced: PricedPolicy,
    num_pending: int,
    room: int,
    *,
    source: str,
    prefix_probs: np.ndarray,
    num_first: int = 0,
    proposal_ms: float = 0.0,
    is_probe: bool = False,
    nodes: tuple[int, ...] | None = None,
    parents: tuple[int, ...] | None = None,
) -> Plan:
    """An action as a plan, without masks whose drafts could never be emitted."""
    if parents is None:  # a tree has no such masks
        useful = [max(0, min(c, room - 2 - anchor)) for anchor, c in enumerate(action.mask_counts)]
        action = Action(action.num_draft_tokens, tuple(useful))
    is_priced = action.num_rows < len(priced.forward_ms)
    ms = step_ms(action, priced.forward_ms, priced.draft_ms) if is_priced else math.nan
    return Plan(
        layout=_layout(num_pending, action, parents),
        source=source,
        num_first=num_first,
        nodes=nodes,
        is_probe=is_probe,
        expected_tokens=expected_tokens(prefix_probs, action.num_draft_tokens),
        expected_ms=ms + proposal_ms,
        proposal_ms=proposal_ms,
        plain_ms=float(priced.forward_ms[1]),
    )


def _verify_all(action: Action, waiting: int) -> Action:
    """An action that verifies all waiting drafts, as far as possible with the same masks."""
    counts = (*action.mask_counts, *(0,) * waiting)[: waiting + 1]
    return Action(waiting, counts)


@lru_cache(maxsize=512)
def _layout(num_pending: int, action: Action, parents: tuple[int, ...] | None = None) -> StepLayout:
    return StepLayout(num_pending, action.num_draft_tokens, action.mask_counts, parents)
