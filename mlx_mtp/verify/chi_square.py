"""Chi-square test of draws against the distributions that they should come from.

Draws come in groups; all draws of a group share one known distribution.  Over all groups the counts
O of the bins have the mean E = sum n P and the covariance C = sum n (diag P - P P^T).  With
C = V diag(w) V^T the statistic is the sum of (v . (O - E))^2 / w over the directions whose variance
w is large enough for a normal distribution, and follows chi-square with as many degrees of freedom.
For one group this is Pearson's test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_EXPECTED = 5.0
_MIN_VARIANCE = MIN_EXPECTED / 2
_MAX_TERMS = 2000
_CHUNK = 1000
_ENOUGH = 20


@dataclass(frozen=True)
class Group:
    """Draws that share one distribution: ``counts`` ``[B]`` and ``probs`` ``[B]`` of the bins."""

    counts: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True)
class ChiSquare:
    """The outcome of one test."""

    statistic: float
    df: int
    p_value: float


def chi_square(groups: Sequence[Group]) -> ChiSquare | None:
    """Test the groups' counts against their distributions.

    Args:
        groups: have the same bins; every ``probs`` sums to 1.

    Returns:
        None if the draws are too few or too certain for a test.
    """
    basis = _Basis(groups)
    if not basis.df:
        return None
    statistic = float(basis.statistics(_total(groups)[None])[0])
    return ChiSquare(statistic, basis.df, chi_square_tail(statistic, basis.df))


def simulated_p_value(groups: Sequence[Group], *, num_replicates: int, seed: int) -> float:
    """The p-value by simulation: how often the statistic of true draws is at least as large.

    The chi-square distribution understates the tails of small counts, so p-values that would fail
    a test are simulated.  The simulation stops early once enough replicates are as large (Besag and
    Clifford 1991).
    """
    basis, rng = _Basis(groups), np.random.default_rng(seed)
    statistic = basis.statistics(_total(groups)[None])[0]
    sizes = [int(group.counts.sum()) for group in groups]
    done = num_as_large = 0
    while done < num_replicates and num_as_large < _ENOUGH:
        counts = np.zeros((_CHUNK, basis.expected.size))
        for size, group in zip(sizes, groups, strict=True):
            counts += rng.multinomial(size, group.probs, size=_CHUNK)
        num_as_large += int((basis.statistics(counts) >= statistic).sum())
        done += _CHUNK
    return (num_as_large + 1) / (done + 1)


class _Basis:
    """Mean of the bins' counts, and the directions in which they are nearly normal."""

    def __init__(self, groups: Sequence[Group]) -> None:
        num_bins = groups[0].probs.size
        self.expected = np.zeros(num_bins)
        covariance = np.zeros((num_bins, num_bins))
        for group in groups:
            size = group.counts.sum()
            self.expected += size * group.probs
            covariance += size * (np.diag(group.probs) - np.outer(group.probs, group.probs))
        variances, directions = np.linalg.eigh(covariance)
        usable = variances >= _MIN_VARIANCE
        self.df = int(usable.sum())
        self._scaled = directions[:, usable] / np.sqrt(variances[usable])  # [B, df]

    def statistics(self, counts: np.ndarray) -> np.ndarray:
        """Statistics ``[N]`` of counts ``[N, B]``."""
        return np.square((counts - self.expected) @ self._scaled).sum(axis=-1)


def _total(groups: Sequence[Group]) -> np.ndarray:
    """Counts of all groups together, ``[B]``."""
    return np.stack([group.counts for group in groups]).sum(axis=0)


def chi_square_tail(statistic: float, df: int) -> float:
    """Probability that a chi-square variable exceeds ``statistic``.

    It is the regularised upper incomplete gamma function Q(df/2, statistic/2), by the series 6.5.29
    of Abramowitz and Stegun (1964) below its mean, and above it by the even part of their continued
    fraction 6.5.31, evaluated backwards.
    """
    a, x = df / 2, statistic / 2
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, _MAX_TERMS):
            term *= x / (a + n)
            total += term
            if term < total * 1e-17:
                break
        return max(0.0, 1 - scale * total)
    tail = 0.0
    for n in range(_MAX_TERMS, 0, -1):
        tail = n * (a - n) / (x + 2 * n + 1 - a + tail)
    return scale / (x + 1 - a + tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979).

    If all hypotheses are true, any result is below alpha with probability alpha or less.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
