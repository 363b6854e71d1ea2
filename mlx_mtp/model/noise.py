"""Random vocabulary ids for mask rows, of adapters without mask tokens.

Uno (arXiv 2609.04010) trains its mask rows on random tokens and draws their ids anew in every step.
Here an id is a function of a seed and the row's position, so that steps can be repeated.
"""

from __future__ import annotations

import numpy as np

from mlx_mtp.model.config import MTPConfig

_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that neighbours differ in all bits after mixing
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def mask_ids(
    config: MTPConfig | None, offsets: np.ndarray, positions: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Ids of mask rows: they count mask tokens from 0, or are drawn from the vocabulary.

    Args:
        config: the adapter's configuration.
        offsets: which mask of its group each row is, int32 ``[rows]``.
        positions: position of each row in the text, ``[rows]``.
        seed: of the drawn ids.

    Returns:
        Ids, int32 ``[rows]``.
    """
    if config is None or not config.noise_ids:
        return offsets
    low, high = config.noise_ids
    return draw_ids(positions, low=low, high=high, seed=seed)


def draw_ids(positions: np.ndarray, *, low: int, high: int, seed: int = 0) -> np.ndarray:
    """Draw an id for each position, uniformly by SplitMix64 (Steele et al., OOPSLA 2014).

    Args:
        positions: positions in the text, ``[rows]``, 0 or more.
        low: smallest id.
        high: largest id and one.
        seed: any whole number.

    Returns:
        Ids, int32 ``[rows]``.
    """
    start = _mixed(np.array([seed % 2**64], np.uint64) + _STEP)
    mixed = _mixed(start + _STEP * (positions.astype(np.uint64) + np.uint64(1)))
    return (low + mixed % np.uint64(high - low)).astype(np.int32)


def _mixed(state: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit words."""
    for shift, factor in _MIX:
        state = (state ^ (state >> shift)) * factor
    return state ^ (state >> np.uint64(31))
