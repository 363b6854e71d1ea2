"""One prefill of a prompt, from which several answers begin."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_mtp.decoding.loop import decode
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel


def prefilled(model: MTPModel, prompt: Sequence[int]) -> MTPCache:
    """Return caches with all of the prompt but its last id."""
    cache = model.make_cache()
    list(decode(model, prompt, max_tokens=1, layout="plain", cache=cache))
    cache.rewind(1)
    cache.checkpoint()
    return cache


def rewound(model: MTPModel, cache: MTPCache, prompt: Sequence[int]) -> MTPCache:
    """Return the caches as ``prefilled`` made them: rewound, or new ones where that cannot be."""
    surplus = cache.offset - len(prompt) + 1
    if cache.can_rewind(surplus):
        cache.rewind(surplus)
        return cache
    return prefilled(model, prompt)  # a sliding window has moved on
