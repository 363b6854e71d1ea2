"""An offer: how many drafts a drafter could propose for the next step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class OfferedTree:
    """A tree of drafts that a drafter could propose.

    Attributes:
        parents: the node that each draft follows, ``[N]``; see ``StepLayout.parents``.
        probs: the drafter's probability of each draft where its parent is accepted, ``[N]``.
    """

    parents: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True, eq=False)
class Offer:
    """What a drafter could propose for the next step.

    How often its drafts are accepted and what they cost is learned by the planner from the steps
    that ran; the fields here are what only the drafter knows.

    Attributes:
        source: name of the drafter.
        num_drafts: maximum number of drafts; 0 offers nothing.
        prefix_probs: probability that at least j drafts are accepted, ``[num_drafts + 1]``, from
            1.0 at j = 0 downwards; None leaves the estimate to the planner.
        first_cost: estimated cost of proposing one draft, in plain steps; 0 where drafts are there
            already.
        next_cost: estimated cost of each further draft, in plain steps.
        follows: drafts of ``MASK`` that come first, in a chain of two drafters; ``num_drafts`` and
            ``prefix_probs`` are of those after them.
        tree: a tree of drafts that may be proposed in place of the chain; None without one.
    """

    source: str
    num_drafts: int
    prefix_probs: np.ndarray | None = None
    first_cost: float = 0.0
    next_cost: float = 0.0
    follows: int = 0
    tree: OfferedTree | None = None
