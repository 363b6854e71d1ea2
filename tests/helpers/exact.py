"""Exact sampling distributions in NumPy float64, written apart from the library, and the chi-square
test that draws are held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import chi2

from mlx_mtp.decoding.sampling import Sampling

SMALLEST_EXPECTED = 5.0  # cells expected less often are pooled


def processed(logits: np.ndarray, context: Sequence[int], sampling: Sampling) -> np.ndarray:
    """Logits ``[V]`` after the logit bias and the repetition penalty."""
    logits = logits.astype(np.float64).copy()
    for token, bias in (sampling.logit_bias or {}).items():
        logits[token] += bias
    penalty = sampling.repetition_penalty
    if penalty is not None:
        for token in set(context[-sampling.repetition_context_size :]):
            logits[token] = (
                logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
            )
    return logits


def filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities ``[V]``: top-p, min-p, XTC, top-k at temperature 1, then the temperature.

    XTC is tossed for: what is drawn from is the mean of both outcomes.
    """
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = np.ones(probs.size, dtype=bool)
    if 0 < sampling.top_p < 1:
        above = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
        kept[order] = above < sampling.top_p
    if sampling.min_p > 0:
        likely = probs >= sampling.min_p * probs.max()
        likely[order[: sampling.min_tokens_to_keep]] = True
        kept &= likely
    left = np.where(kept, probs, 0) / probs[kept].sum()
    above = [token for token in order if left[token] > sampling.xtc_threshold]
    dropped = np.zeros_like(kept)
    dropped[[token for token in above[:-1] if left[token] > left[above[-1]]]] = True
    dropped[list(sampling.xtc_special_tokens or ())] = False
    share = sampling.xtc_probability

    def drawn(kept: np.ndarray) -> np.ndarray:
        if sampling.top_k > 0:
            kept = kept.copy()
            kept[[token for token in order if kept[token]][sampling.top_k :]] = False
        weights = np.where(kept, np.exp((logits - logits.max()) / sampling.temp), 0.0)
        return weights / weights.sum()

    return (1 - share) * drawn(kept) + share * drawn(kept & ~dropped)


def exact_probs(logits: np.ndarray, context: Sequence[int], sampling: Sampling) -> np.ndarray:
    """What plain sampling draws from behind a context, ``[V]``."""
    return filtered(processed(logits, context, sampling), sampling)


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Chi-square test of counts against probabilities, over cells or over rows of cells.

    Each row of a table is a draw of its own: its total is given.  An impossible cell that was
    drawn gives 0.
    """
    statistic, freedom = 0.0, 0
    for row, chances in zip(np.atleast_2d(counts), np.atleast_2d(probs), strict=True):
        if chances.sum() == 0 or (row[chances <= 0] > 0).any():
            if row.sum() > 0:
                return 0.0
            continue
        seen, expected = _pooled(row, chances / chances.sum() * row.sum())
        if expected.size > 1:
            statistic += float(((seen - expected) ** 2 / expected).sum())
            freedom += expected.size - 1
    return float(chi2.sf(statistic, freedom)) if freedom else 1.0


def _pooled(seen: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge the rarest cells until each is expected often enough."""
    order = np.argsort(expected)
    small = int((np.cumsum(expected[order]) < SMALLEST_EXPECTED).sum()) + 1
    small = max(small, int((expected < SMALLEST_EXPECTED).sum()))
    if small >= seen.size:
        return seen[:1], expected[:1]
    groups = np.concatenate([[0], np.arange(small, seen.size)])
    return np.add.reduceat(seen[order], groups), np.add.reduceat(expected[order], groups)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's adjusted p-values, smallest first."""
    ordered = sorted(p_values)
    adjusted = [p * (len(ordered) - rank) for rank, p in enumerate(ordered)]
    return np.minimum(np.maximum.accumulate(adjusted), 1.0).tolist()
