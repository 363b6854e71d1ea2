"""How often drafts hold: counts by position that fade, on top of longer ones, on top of a prior.

A draft is only looked at where all drafts before it held, so what is counted is the chance that
draft j holds given those before it; their products are the chances that at least j hold.

Two memories are kept.  The long one tells how the adapter does in general, the short one how it
does in the text at hand.  Chance alone parts them a little, and then the long one, which is less
noisy, says most; where they part by more, the text has changed and the short one is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KEEP = 0.96  # of a count, when the same position is seen again: about the last 25 count
KEEP_LONG = 0.998  # of a count in the long memory: about the last 500
LONG_WEIGHT = 60.0  # observations that the long memory stands for beside the short one
_BY_CHANCE = 4.0  # standard deviations, squared, by which the memories part by chance
PRIOR_WEIGHT = 20.0  # observations that the prior stands for
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
        self._prior = [float(chance) for chance in prior]
        self._weight = weight
        self._keep = keep
        # Plain lists: they are short, and looked at in every step.
        self._seen, self._held = [0.0] * len(prior), [0.0] * len(prior)
        self._long_seen, self._long_held = [0.0] * len(prior), [0.0] * len(prior)

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
        keep, seen, held = self._keep, self._seen, self._held
        long_seen, long_held = self._long_seen, self._long_held
        for at in range(min(num_draft_tokens, num_accepted + 1, len(seen))):
            holds = at < num_accepted
            seen[at] = seen[at] * keep + 1
            held[at] = held[at] * keep + holds
            long_seen[at] = long_seen[at] * KEEP_LONG + 1
            long_held[at] = long_held[at] * KEEP_LONG + holds

    def chances(self) -> np.ndarray:
        """Chance that each draft holds if those before it do, ``[positions]``."""
        general = self._general()
        seen, held = np.array(self._seen), np.array(self._held)
        variance = np.maximum(general * (1 - general), 0.01) * np.maximum(seen, 1e-9)
        parted = (held - seen * general) ** 2 / variance  # in standard deviations, squared
        trust = LONG_WEIGHT * np.minimum(1, _BY_CHANCE / np.maximum(parted, 1e-9)) ** 2
        return (held + trust * general) / (seen + trust)

    def _general(self) -> np.ndarray:
        """The long memory's chances, ``[positions]``.

        Where a position does better than its prior said, so will the next one, by half as much: a
        position that is never tried could not tell.
        """
        found, shift, weight = [], 0.0, self._weight
        for prior, seen, held in zip(self._prior, self._long_seen, self._long_held, strict=True):
            expected = min(max(prior + shift, 0.0), 1.0)
            found.append((held + weight * expected) / (seen + weight))
            shift = 0.5 * (found[-1] - prior)
        return np.array(found)

    def holds(self, num_draft_tokens: int) -> np.ndarray:
        """Chance that at least j drafts hold, ``[drafts + 1]``, 1.0 at j = 0."""
        chances = self.chances()
        padded = np.full(num_draft_tokens, chances[-1])
        known = min(num_draft_tokens, len(chances))
        padded[:known] = chances[:known]
        return np.concatenate([[1.0], np.cumprod(padded)])

    def fresh(self) -> Acceptance:
        """The same prior, with nothing seen yet."""
        return Acceptance(self._prior, weight=self._weight, keep=self._keep)
