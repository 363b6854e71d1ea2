"""How sure a ratio of two speeds is: a confidence interval by resampling prompts.

Two modes answered the same prompts.  Their speeds are all tokens over all seconds, and the speed-up
is the ratio of the two.  Prompts are drawn with replacement, each with all its answers in both
modes, and the ratio is worked out anew; the interval holds the middle of what comes out.

With few prompts the plain percentiles are too narrow.  They are widened as Student's t is wider
than the normal law, and by the bias of a sample's spread (Hesterberg, "What teachers should know
about the bootstrap", 2015, the expanded percentile interval).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
LEAST_PROMPTS = 5  # of fewer, no resampling tells what the next one would be like


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
        mode: ``[n, 2]``, tokens and seconds of each prompt, all its answers together.
        base: ``[n, 2]``, the same in the mode that it is held against.
        seed: the same one gives the same interval.
        confidence: how often the interval should hold the true ratio.
        resamples: how often prompts are drawn.

    Returns:
        The ends; None with fewer than ``LEAST_PROMPTS`` prompts, or where no time was counted.
    """
    n = len(mode)
    if n < LEAST_PROMPTS or not (base.sum(0) > 0).all() or not (mode.sum(0) > 0).all():
        return None
    rng = np.random.default_rng(seed)
    times = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, n]
    ours, theirs = times @ mode, times @ base  # [resamples, 2]
    some = (ours > 0).all(1) & (theirs > 0).all(1)  # draws of prompts with one token only
    ratios = (ours[some, 0] / ours[some, 1]) / (theirs[some, 0] / theirs[some, 1])
    tail = expanded_tail(n, confidence)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(n: int, confidence: float = CONFIDENCE) -> float:
    """Share of resamples to cut off at each end, with ``n`` prompts."""
    reach = math.sqrt(n / (n - 1)) * student_quantile((1 + confidence) / 2, n - 1)
    return NormalDist().cdf(-reach)


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal one.

    Good to 1 in 200 from four degrees of freedom on (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
