"""What is known about a drafter without mask rows: how often its drafts hold and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.options import Option, PricedOffer, Prices
from mlx_mtp.planning.policy import Action, expected_tokens
from mlx_mtp.planning.probing import Probing
from mlx_mtp.planning.settings import DEFAULTS

_MAX_DRAFTS = 16  # positions that are told apart; those after them are like the last
_SETTLED, _SLOW = 18, 0.05  # observations of the cost after which each counts for little
_LEAST_CHANGE = 0.25  # of the cost by one observation


@dataclass
class Estimates:
    """Estimates for one drafter of a model, from one answer to the next.

    Attributes:
        acceptance: acceptance of its drafts by position.
        cost_factor: what the steps that ran have shown of its cost, as a factor on the prior.
        num_seen: observations of the cost.
        probing: when to try it where something else wins.
    """

    acceptance: Acceptance
    cost_factor: float = 1.0
    num_seen: int = 0
    probing: Probing = field(default_factory=Probing)

    @classmethod
    def unknown(cls) -> Estimates:
        """Start where nothing is known of the drafter."""
        return cls(Acceptance.unknown(_MAX_DRAFTS))

    def fresh(self) -> Estimates:
        """The same prior acceptance, with nothing observed yet."""
        return Estimates(self.acceptance.fresh())

    @property
    def is_cost_new(self) -> bool:
        """Whether too few steps have shown what proposing takes."""
        return self.num_seen < _SETTLED

    def draft_ms(self, offer: Offer, count: int, plain_ms: float) -> np.ndarray:
        """Milliseconds to propose j drafts, ``[count + 1]``, 0.0 at 0.

        Args:
            offer: the prior of the cost.
            count: maximum number of drafts.
            plain_ms: milliseconds of a plain step.
        """
        steps = offer.first_cost + offer.next_cost * np.arange(-1, count)
        steps[0] = 0.0
        return steps * (self.cost_factor * plain_ms)

    def observe(
        self,
        num_drafts: int,
        num_accepted: int,
        *,
        of_expected: float,
        share: float,
        is_probe: bool,
    ) -> None:
        """Learn from a step, whoever proposed its drafts.

        Args:
            num_drafts: verified drafts of this drafter.
            num_accepted: accepted drafts.
            of_expected: time of the step over the time expected.
            share: expected part of proposing in it, 0 to 1.
            is_probe: whether it was a probe of this drafter.
        """
        if num_drafts:
            self.acceptance.observe(num_drafts, num_accepted)
            self._observe_cost(of_expected, share)
        self.probing.observe(
            is_probe=is_probe,
            masks=0,
            drafts=num_drafts,
            num_accepted=num_accepted,
            of_expected=of_expected,
        )

    def probe(self, priced: PricedOffer, prices: Prices) -> Option | None:
        """A step that tries a few drafts, if it is time for it."""
        if not self.probing.may_be_due:
            return None
        count = min(DEFAULTS.probe_masks, len(priced.prefix_probs) - 1)
        ms = prices.forward_ms[1 + count] + priced.draft_ms[count]
        emitted = expected_tokens(priced.prefix_probs, count)
        if not self.probing.is_due(float(ms / prices.forward_ms[1]) - emitted):
            return None
        return Option(
            action=Action(count, (0,) * (count + 1)),
            source=priced.offer.source,
            value=emitted - prices.rate * float(ms),
            prefix_probs=priced.prefix_probs,
            proposal_ms=float(priced.draft_ms[count]),
            is_probe=True,
        )

    def _observe_cost(self, ratio: float, share: float) -> None:
        """Let the cost follow a step's time.

        At first all of the difference is due to proposing, whose cost is a guess; later a part of
        it that is as large as the part of proposing in the step.
        """
        if not share > 0:  # NaN of a step whose time was not expected
            return
        if self.is_cost_new:
            change = 1 + (ratio - 1) / share / (self.num_seen + 2)
            self.cost_factor *= max(change, _LEAST_CHANGE)
        else:
            self.cost_factor *= ratio ** (_SLOW * share)
        self.num_seen += 1
