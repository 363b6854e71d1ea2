"""How often drafts hold: counts by position that fade, on top of a prior.

A draft is only looked at where all drafts before it held, so what is counted is the chance that
draft j holds given those before it; their products are the chances that at least j hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KEEP = 0.96  # of a count, when the same position is seen again: about the last 25 count
PRIOR_WEIGHT = 6.0  # observations that the prior stands for
UNKNOWN = 0.5  # chance that a draft holds where nothing is known


class Acceptance:
    """Running estimate for the drafts of one source.

    Args:
        prior: chance that draft j holds if those before it do, one for each position; longer
            drafts are taken to hold as the last position does.
        weight: how many observations the prior stands for.
        keep: what is left of a position's counts when it is seen again.

    Raises:
        ValueError: a chance is outside 0 to 1, or there is none.
    """

    def __init__(
        self, prior: Sequence[float], *, weight: float = PRIOR_WEIGHT, keep: float = KEEP
    ) -> None:
        if not len(prior) or not all(0 <= chance <= 1 for chance in prior):
            raise ValueError(f"a prior needs chances between 0 and 1, got {list(prior)}")
        self._prior = np.asarray(prior, dtype=float)
        self._weight = weight
        self._keep = keep
        self._seen = np.zeros(len(prior))
        self._held = np.zeros(len(prior))

    @classmethod
    def from_shares(cls, shares: Sequence[float], *, weight: float = PRIOR_WEIGHT) -> Acceptance:
        """Start from the shares of anchors behind which at least j drafts held, j from 1."""
        before = np.concatenate([[1.0], shares[:-1]])
        chances = np.divide(shares, before, out=np.zeros(len(shares)), where=before > 0)
        return cls(np.clip(chances, 0, 1).tolist(), weight=weight)

    @property
    def num_positions(self) -> int:
        """Positions that are told apart."""
        return len(self._prior)

    def observe(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Count a step: so many drafts were verified, the first ``num_accepted`` of them held."""
        looked_at = min(num_draft_tokens, num_accepted + 1, self.num_positions)
        self._seen[:looked_at] = self._seen[:looked_at] * self._keep + 1
        self._held[:looked_at] *= self._keep
        self._held[: min(num_accepted, looked_at)] += 1

    def chances(self) -> np.ndarray:
        """Chance that each draft holds if those before it do, ``[positions]``."""
        return (self._held + self._weight * self._prior) / (self._seen + self._weight)

    def holds(self, num_draft_tokens: int) -> np.ndarray:
        """Chance that at least j drafts hold, ``[drafts + 1]``, 1.0 at j = 0."""
        chances = self.chances()
        padded = np.full(num_draft_tokens, chances[-1])
        known = min(num_draft_tokens, len(chances))
        padded[:known] = chances[:known]
        return np.concatenate([[1.0], np.cumprod(padded)])

    def fresh(self) -> Acceptance:
        """The same prior, with nothing seen yet."""
        return Acceptance(self._prior.tolist(), weight=self._weight, keep=self._keep)
