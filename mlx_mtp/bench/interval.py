"""Confidence interval of a speed-up by bootstrap over prompts.

Two modes answered the same prompts.  Their speeds are all tokens divided by all seconds, and the
speed-up is the ratio of the two.  Prompts are resampled with replacement, each with all its answers
in both modes, and the ratio is computed again; the interval contains the middle of the results.

With few prompts the plain percentiles are too narrow.  They are widened as Student's t is wider
than the normal distribution, and by the bias of a sample's standard deviation (Hesterberg, "What
teachers should know about the bootstrap", 2015, the expanded percentile interval).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
MIN_PROMPTS = 5  # fewer prompts do not represent their kind


def ratio_interval(
    mode: np.ndarray,
    base: np.ndarray,
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Confidence interval of a ratio of speeds.

    Args:
        mode: tokens and seconds of each prompt, all its answers together, ``[n, 2]``.
        base: the same in the baseline mode, ``[n, 2]``.
        seed: random seed; the same seed gives the same interval.
        confidence: probability that the interval contains the true ratio.
        resamples: number of resamples.

    Returns:
        The ends; None with fewer than ``MIN_PROMPTS`` prompts, or without tokens or seconds.
    """
    n = len(mode)
    if n < MIN_PROMPTS or not (base.sum(0) > 0).all() or not (mode.sum(0) > 0).all():
        return None
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, n]
    ours, theirs = counts @ mode, counts @ base  # [resamples, 2]
    valid = (ours > 0).all(1) & (theirs > 0).all(1)  # not only prompts with one token
    ratios = (ours[valid, 0] / ours[valid, 1]) / (theirs[valid, 0] / theirs[valid, 1])
    tail = expanded_tail(n, confidence)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(n: int, confidence: float = CONFIDENCE) -> float:
    """Share of resamples to discard at each end with ``n`` prompts."""
    width = math.sqrt(n / (n - 1)) * student_quantile((1 + confidence) / 2, n - 1)
    return NormalDist().cdf(-width)


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal quantile.

    The relative error is below 1/200 for four or more degrees of freedom (Abramowitz and Stegun,
    26.7.5).
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
