"""Acceptance of the nodes of a tree of drafts, from the probabilities that the drafter gives them.

A drafter is sure of too much, or of too little, and differently in different texts.  Its log-odds x
are therefore corrected to a + b x (Platt 1999), starting from a = 0 and b = 1, by a logistic
regression that takes one step of Newton's method per step of decoding.  A node is judged where its
parent was accepted, whether it was verified or not, because the text then shows which token
followed.
"""

from __future__ import annotations

import numpy as np

_PRIOR = np.array([[4.0, 0.0], [0.0, 20.0]])  # evidence that a = 0 and b = 1 are worth
_KEEP = 0.99  # of the evidence of earlier steps
_MIN_SLOPE = 0.1  # a likelier draft is always more likely


class TreeAcceptance:
    """Probability that a node is right if its parent is; keeps learning."""

    def __init__(self) -> None:
        self._line = np.array([0.0, 1.0])  # a and b
        self._evidence = np.zeros((2, 2))

    def probs(self, drafted: np.ndarray) -> np.ndarray:
        """Correct a drafter's probabilities ``[N]``."""
        return _sigmoid(self._line[0] + self._line[1] * _log_odds(drafted))

    def observe(self, drafted: np.ndarray, right: np.ndarray) -> None:
        """Learn from nodes whose parents were right.

        Args:
            drafted: the drafter's probabilities, ``[n]``.
            right: whether each node's token followed, ``[n]``.
        """
        features = np.stack([np.ones(len(drafted)), _log_odds(drafted)])  # [2, n]
        probs = _sigmoid(self._line @ features)
        self._evidence = _KEEP * self._evidence + (features * probs * (1 - probs)) @ features.T
        pull = _PRIOR @ (np.array([0.0, 1.0]) - self._line) * (1 - _KEEP)
        change = np.linalg.solve(self._evidence + _PRIOR, features @ (right - probs) + pull)
        self._line += change
        self._line[1] = max(self._line[1], _MIN_SLOPE)


def _log_odds(probs: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities, finite at 0 and 1."""
    probs = np.clip(probs, 1e-4, 1 - 1e-4)
    return np.log(probs / (1 - probs))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
