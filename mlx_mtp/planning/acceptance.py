"""How often drafts are accepted: fading counts by position, on top of longer ones and a prior.

A draft is judged only where all drafts before it were accepted, so what is counted is the
probability that draft j is accepted given those before it.  Products of these are the probabilities
that at least j drafts are accepted.

There are two memories.  The long one estimates the adapter's acceptance in general, the short one
that in the text at hand.  Where the two differ by no more than chance explains, the long memory,
which is less noisy, has most weight; where they differ by more, the text has changed and the short
memory prevails.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_mtp.planning.settings import DEFAULTS, PlannerSettings


class Acceptance:
    """Running estimate for the drafts of one source.

    Args:
        prior: probability that draft j is accepted if those before it are, by position; beyond the
            last position its probability is used.
        settings: weights and memory lengths.

    Raises:
        ValueError: a probability is outside 0 to 1, or there is none.
    """

    def __init__(self, prior: Sequence[float], *, settings: PlannerSettings = DEFAULTS) -> None:
        if not len(prior) or not all(0 <= prob <= 1 for prob in prior):
            raise ValueError(f"a prior needs probabilities between 0 and 1, got {list(prior)}")
        self._prior = [float(prob) for prob in prior]
        self._settings = settings
        # Plain lists, because they are short and used in every step.
        self._seen, self._accepted = [0.0] * len(prior), [0.0] * len(prior)
        self._long_seen, self._long_accepted = [0.0] * len(prior), [0.0] * len(prior)

    @classmethod
    def unknown(cls, num_draft_tokens: int, *, settings: PlannerSettings = DEFAULTS) -> Acceptance:
        """Start where nothing is known of the drafts."""
        return cls([settings.unknown_prob] * max(num_draft_tokens, 1), settings=settings)

    @classmethod
    def from_shares(
        cls, shares: Sequence[float], *, settings: PlannerSettings = DEFAULTS
    ) -> Acceptance:
        """Start from the shares of anchors after which at least j drafts were accepted, j >= 1."""
        before = np.concatenate([[1.0], shares[:-1]])
        probs = np.divide(shares, before, out=np.zeros(len(shares)), where=before > 0)
        return cls(np.clip(probs, 0, 1).tolist(), settings=settings)

    def observe(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Count a step that verified this many drafts and accepted the first ``num_accepted``."""
        keep, keep_long = self._settings.keep, self._settings.keep_long
        seen, accepted = self._seen, self._accepted
        long_seen, long_accepted = self._long_seen, self._long_accepted
        for position in range(min(num_draft_tokens, num_accepted + 1, len(seen))):
            is_accepted = position < num_accepted
            seen[position] = seen[position] * keep + 1
            accepted[position] = accepted[position] * keep + is_accepted
            long_seen[position] = long_seen[position] * keep_long + 1
            long_accepted[position] = long_accepted[position] * keep_long + is_accepted

    def draft_probs(self) -> np.ndarray:
        """Probability that each draft is accepted if those before it are, ``[positions]``."""
        settings, general = self._settings, self._general()
        seen, accepted = np.array(self._seen), np.array(self._accepted)
        variance = np.maximum(general * (1 - general), 0.01) * np.maximum(seen, 1e-9)
        distance = (accepted - seen * general) ** 2 / variance  # in squared standard deviations
        by_chance = np.minimum(1, settings.chance_variance / np.maximum(distance, 1e-9))
        weight = settings.long_weight * by_chance**2
        return (accepted + weight * general) / (seen + weight)

    def _general(self) -> np.ndarray:
        """The long memory's probabilities, ``[positions]``.

        A position that does better than its prior moves the next position's prior by half as much,
        because a position that is never verified cannot learn by itself.
        """
        probs, shift, weight = [], 0.0, self._settings.prior_weight
        columns = zip(self._prior, self._long_seen, self._long_accepted, strict=True)
        for prior, seen, accepted in columns:
            expected = min(max(prior + shift, 0.0), 1.0)
            probs.append((accepted + weight * expected) / (seen + weight))
            shift = 0.5 * (probs[-1] - prior)
        return np.array(probs)

    def prefix_probs(self, num_draft_tokens: int) -> np.ndarray:
        """Probability that at least j drafts are accepted, ``[drafts + 1]``, 1.0 at j = 0."""
        probs = self.draft_probs()
        padded = np.full(num_draft_tokens, probs[-1])
        known = min(num_draft_tokens, len(probs))
        padded[:known] = probs[:known]
        return np.concatenate([[1.0], np.cumprod(padded)])

    def fresh(self) -> Acceptance:
        """The same prior, with nothing observed yet."""
        return Acceptance(self._prior, settings=self._settings)
