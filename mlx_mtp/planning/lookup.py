"""Acceptance of looked-up drafts, by the number of ids that matched before them.

A looked-up id is judged by the text as it comes, whether it was verified or not, so learning costs
nothing.
"""

from __future__ import annotations

import math

import numpy as np

MAX_LOOKUP_TOKENS = 24  # drafts of one lookup
MAX_MATCH = 32  # ids that are compared
_CLASSES = (1, 2, 3, 4, 6, 10, 16, 32)  # matches from one of these lengths to the next are alike
_PRIOR = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# An observation weighs as much as it says, chance * (1 - chance): a quarter at most.
_PRIOR_WEIGHT = 40.0  # observations that the prior is worth
_MAX_WEIGHT = 40.0  # of a class; more would be slow to follow
_TEXT_WEIGHT, _MAX_TEXT_WEIGHT = 0.4, 2.0  # of no shift, and of what a text has shown
_CLASS_OF = (np.searchsorted(_CLASSES, np.arange(MAX_MATCH + 1), side="right") - 1).tolist()


class LookupAcceptance:
    """Acceptance of looked-up ids in general, by the length of the match.

    After accepted ids the match is longer by them, so one table serves all places of a draft.

    Attributes:
        logits: log-odds that an id is accepted if those before it are, by class of length.
        weights: evidence for each.
    """

    def __init__(self) -> None:
        self.logits = [math.log(chance / (1 - chance)) for chance in _PRIOR]
        self.weights = [_PRIOR_WEIGHT * chance * (1 - chance) for chance in _PRIOR]

    def in_text(self) -> TextAcceptance:
        """The same for a new text."""
        return TextAcceptance(self)


class TextAcceptance:
    """Acceptance of looked-up ids in one text.

    Texts differ: an edit repeats its prompt, a chat uses some of its words.  So a text has a shift
    of all log-odds, and the general ones are those of a text without (a logistic regression with
    a random effect, fitted one observation at a time).

    Args:
        general: acceptance in all texts, which keeps learning.
    """

    def __init__(self, general: LookupAcceptance) -> None:
        self._general = general
        self._shift, self._weight = 0.0, _TEXT_WEIGHT

    def prefix_probs(self, match: int, num_draft_tokens: int) -> np.ndarray:
        """Probability that at least j drafts are accepted, ``[drafts + 1]``."""
        logits, probs = self._general.logits, [1.0]
        chances = [1 / (1 + math.exp(-self._shift - logit)) for logit in logits]
        for length in range(match, match + num_draft_tokens):
            probs.append(probs[-1] * chances[_CLASS_OF[min(length, MAX_MATCH)]])
        return np.array(probs)

    def observe(self, match: int, num_judged: int, num_right: int) -> None:
        """Count looked-up ids of which the first ``num_right`` were right."""
        logits, weights = self._general.logits, self._general.weights
        for place in range(min(num_judged, num_right + 1)):
            index = _CLASS_OF[min(match + place, MAX_MATCH)]
            chance = 1 / (1 + math.exp(-self._shift - logits[index]))
            error, weight = (place < num_right) - chance, chance * (1 - chance)
            self._weight = min(self._weight + weight, _MAX_TEXT_WEIGHT)
            weights[index] = min(weights[index] + weight, _MAX_WEIGHT)
            self._shift += error / self._weight
            logits[index] += error / weights[index]
