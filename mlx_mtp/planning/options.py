"""Steps that verify drafts of one offer: the best number of them, and what it is worth.

A step is worth the tokens that it emits, plus what the drafts of its mask rows are worth later,
minus the tokens that the best policy in the long run emits in the same time.  The steps of
``policy`` are worth ``policy.values`` by that measure; offers are compared with them one step at a
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_mtp.model.layout import subtree_parents
from mlx_mtp.planning.offer import Offer, OfferedTree
from mlx_mtp.planning.plan import MASK
from mlx_mtp.planning.policy import RESET_PROB, Action, Policy, step_ms
from mlx_mtp.planning.tree import best_step, worth_by_lag


@dataclass(frozen=True, eq=False)
class Prices:
    """Costs that the options of a step are compared by.

    Attributes:
        policy: the best policy for mask tokens and plain steps.
        forward_ms: milliseconds of a forward by its rows, ``[R + 1]``.
        mask_ms: milliseconds of drafting by the size of the mask group, ``[k + 1]``.
        rate: tokens per millisecond in the long run.
    """

    policy: Policy
    forward_ms: np.ndarray
    mask_ms: np.ndarray
    rate: float

    def policy_value(self, waiting: int) -> float:
        """What the policy's step with this number of waiting drafts is worth."""
        policy = self.policy
        ms = step_ms(policy.actions[waiting], self.forward_ms, self.mask_ms)
        return float(policy.values[waiting] - (self.rate - policy.rate) * ms)


@dataclass(frozen=True, eq=False)
class PricedOffer:
    """An offer with estimates.

    Attributes:
        offer: the offer.
        prefix_probs: probability that at least j drafts are accepted, ``[drafts + 1]``.
        draft_ms: milliseconds to propose j drafts, ``[drafts + 1]``.
    """

    offer: Offer
    prefix_probs: np.ndarray
    draft_ms: np.ndarray

    def rate(self, forward_ms: np.ndarray) -> float:
        """Tokens per millisecond if every step verified the best number of these drafts."""
        emitted = np.cumsum(self.prefix_probs)[1:]
        ms = forward_ms[2 : len(self.prefix_probs) + 1] + self.draft_ms[1:]
        return float((emitted / ms).max())


@dataclass(frozen=True, eq=False)
class Option:
    """A step with drafts of an offer.

    Attributes:
        action: drafts and masks.
        source: source of the drafts.
        value: what it is worth, in tokens.
        prefix_probs: probability that each draft is accepted, after 1.0, ``[drafts + 1]``.
        proposal_ms: milliseconds to propose them.
        num_first: in a chain, number of drafts of its first source.
        nodes: in a tree, which nodes are verified; see ``Plan``.
        parents: in a tree, their parents among them; see ``StepLayout``.
        is_probe: whether it is chosen to learn.
    """

    action: Action
    source: str
    value: float
    prefix_probs: np.ndarray
    proposal_ms: float = 0.0
    num_first: int = 0
    nodes: tuple[int, ...] | None = None
    parents: tuple[int, ...] | None = None
    is_probe: bool = False


def offer_option(priced: PricedOffer, prices: Prices) -> Option | None:
    """The best number of drafts of an offer, without masks or with some after the last draft.

    Returns:
        The option, or None if no step has so few rows.
    """
    counts = np.arange(1, len(priced.prefix_probs))
    emitted, all_accepted = np.cumsum(priced.prefix_probs)[1:], priced.prefix_probs[1:]
    policy, forward_ms = prices.policy, prices.forward_ms
    best: Option | None = None
    for masks in {0, max(policy.actions[0].mask_counts)}:
        rows = 1 + counts + masks
        fits = rows < len(forward_ms)
        ms = forward_ms[np.where(fits, rows, 0)] + prices.mask_ms[masks] + priced.draft_ms[1:]
        later = (1 - RESET_PROB) * all_accepted * policy.values[masks]
        values = np.where(fits, emitted + later - prices.rate * ms, -np.inf)
        index = int(values.argmax())
        value, count = float(values[index]), index + 1
        if np.isfinite(value) and (best is None or value > best.value):
            best = Option(
                action=Action(count, (0,) * count + (masks,)),
                source=priced.offer.source,
                value=value,
                prefix_probs=priced.prefix_probs,
                proposal_ms=float(priced.draft_ms[count]),
            )
    return best


def chain_option(
    priced: PricedOffer, prices: Prices, mask_probs: np.ndarray, waiting: int
) -> Option | None:
    """The policy's step with drafts of an offer after all the waiting drafts of mask tokens.

    Args:
        priced: an offer that follows the waiting drafts.
        prices: costs of the steps.
        mask_probs: acceptance of the waiting drafts, ``[k + 1]``.
        waiting: number of waiting drafts.

    Returns:
        The best one, or None if the policy does not verify all waiting drafts.
    """
    action, policy, forward_ms = prices.policy.actions[waiting], prices.policy, prices.forward_ms
    if not waiting == priced.offer.follows == action.num_draft_tokens > 0:
        return None
    count = min(len(priced.prefix_probs), len(forward_ms) - action.num_rows) - 1
    if count < 1:
        return None
    probs = priced.prefix_probs[: count + 1]
    # Where the first of the added drafts is accepted, the masks after the last one before it are
    # of no use.
    lost = (1 - RESET_PROB) * probs[1] * policy.values[action.mask_counts[-1]]
    gained = mask_probs[waiting] * (np.cumsum(probs[1:]) - lost)
    ms = forward_ms[action.num_rows + 1 :][:count] - forward_ms[action.num_rows]
    values = prices.policy_value(waiting) + gained - prices.rate * ms
    index = int(values.argmax())
    added = index + 1
    return Option(
        action=Action(waiting + added, action.mask_counts + (0,) * added),
        source=priced.offer.source,
        value=float(values[index]),
        prefix_probs=np.concatenate([mask_probs[:waiting], mask_probs[waiting] * probs]),
        num_first=waiting,
    )


def tree_option(tree: OfferedTree, prices: Prices, *, room: int) -> Option:
    """The best step with nodes of a tree of mask drafts.

    Args:
        tree: the nodes.
        prices: costs of the steps.
        room: tokens that may still be emitted.
    """
    worth = worth_by_lag(prices.policy.values)
    step = best_step(tree, worth, prices.forward_ms, prices.mask_ms, rate=prices.rate, room=room)
    nodes = step.nodes or None
    return Option(
        action=Action(len(step.nodes), step.mask_counts),
        source=MASK if nodes else "",
        value=step.value,
        prefix_probs=step.probs,
        nodes=nodes,
        parents=subtree_parents(tree.parents, step.nodes) if nodes else None,
    )
