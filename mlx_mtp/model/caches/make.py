"""The caches of a model: made new, read from a file, or around those of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.caches.cache_list import LayerCacheList
from mlx_mtp.model.caches.layers import (
    ChunkLayerCache,
    LayerCache,
    QuantizedLayerCache,
    WindowLayerCache,
)
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.wrappers import WindowLayer

_REWINDABLE = (lm_cache.KVCache, lm_cache.ChunkedKVCache, lm_cache.ArraysCache)


def unsupported_reason(base: nn.Module) -> str | None:
    """Return why a model's caches cannot be rewound, or None if they can."""
    for layer in lm_cache.make_prompt_cache(base):
        for part in _parts(layer):
            if type(part) in _REWINDABLE:
                continue
            if type(part) is lm_cache.RotatingKVCache and part.keep == 0:
                continue
            return f"its cache ({type(part).__name__}) cannot be rewound exactly"
    return None


def _parts(layer: Any) -> Sequence[Any]:
    """The caches of a layer with several, or the one that it is."""
    return layer.caches if isinstance(layer, lm_cache.CacheList) else [layer]


def make_cache(
    base: nn.Module,
    *,
    scope: StepScope,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
) -> MTPCache:
    """Make the caches of a model.

    Args:
        base: the mlx-lm model; its own ``make_cache`` says which layers have a window.
        scope: the model's step scope.
        max_kv_size: store only the first 4 rows and the last ``max_kv_size - 4``.
        kv_bits: bits of quantised keys and values; None leaves them as they are.
        kv_group_size: elements per scale of quantised keys and values.
        quantized_kv_start: context length from which they are quantised.

    Raises:
        ValueError: the combination is not possible.
    """
    if max_kv_size is not None and max_kv_size < 8:
        raise ValueError(f"max_kv_size must be at least 8, got {max_kv_size}")
    if kv_bits not in (None, 2, 3, 4, 5, 6, 8):
        raise ValueError(f"kv_bits must be 2, 3, 4, 5, 6 or 8, got {kv_bits}")
    if kv_group_size not in (32, 64, 128):
        raise ValueError(f"kv_group_size must be 32, 64 or 128, got {kv_group_size}")

    def rewindable(inner: Any, window: int | None = None) -> Any:
        if isinstance(inner, lm_cache.CacheList):
            return LayerCacheList([rewindable(part) for part in inner.caches])
        if isinstance(inner, lm_cache.ArraysCache):
            return RecurrentLayerCache(len(inner.cache))
        if isinstance(inner, lm_cache.ChunkedKVCache):
            return ChunkLayerCache(window=inner.chunk_size, scope=scope)
        if isinstance(inner, lm_cache.RotatingKVCache):
            return WindowLayerCache(window=inner.max_size, scope=scope)
        if window is not None and kv_bits is None:
            return WindowLayerCache(window=window, scope=scope)
        if max_kv_size is not None:
            return WindowLayerCache(window=max_kv_size - 4, keep=4, scope=scope)
        return LayerCache(inner, scope=scope)

    # Some layers use the cache of an earlier one, and some have two.
    inners, windows = lm_cache.make_prompt_cache(base), _windows(base)
    return MTPCache(
        [rewindable(inner, windows.get(index)) for index, inner in enumerate(inners)],
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )


def _windows(base: Any) -> dict[int, int]:
    """Windows by layer that mlx-lm's class does not apply."""
    return {
        index: layer.window
        for index, layer in enumerate(base.layers)
        if isinstance(layer, WindowLayer)
    }


def load_prompt_cache(
    path: Path, *, sample: MTPCache, scope: StepScope
) -> tuple[MTPCache, dict[str, str]]:
    """Read a file of ``mlx_lm.cache_prompt``.

    Args:
        path: the file.
        sample: caches of this model with at least one row, for their shapes and types.
        scope: the model's step scope.

    Returns:
        The caches and the file's metadata (``model``, ``tokenizer_config``).

    Raises:
        ValueError: the file cannot be read, or was not made with a model of this shape.
    """
    try:
        saved, metadata = lm_cache.load_prompt_cache(str(path), return_metadata=True)
    except Exception as error:  # mlx raises many kinds for a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a prompt cache: {reason}") from None
    if any(_is_empty(inner) for inner in saved):
        raise ValueError(f"{path} is an empty prompt cache")
    return from_mlx_lm(saved, sample=sample, scope=scope, name=str(path)), metadata


def from_mlx_lm(
    caches: Sequence[Any], *, sample: MTPCache, scope: StepScope, name: str = "prompt_cache"
) -> MTPCache:
    """Wrap mlx-lm's caches, which may be empty; all but rotating ones then share their rows.

    Args:
        caches: one per layer.
        sample: caches of this model with at least one row, for their shapes and types.
        scope: the model's step scope.
        name: what the caches are called in messages.

    Raises:
        ValueError: a cache cannot be rewound, or was not made with a model of this shape.
    """
    if len(caches) != len(sample.layers):
        raise ValueError(
            f"{name} was made with another model: it has {len(caches)} layers, "
            f"this model has {len(sample.layers)}"
        )
    offsets = {part.offset for inner in caches for part in _parts(inner) if hasattr(part, "offset")}
    if len(offsets) > 1:
        raise ValueError(f"{name} has layers with different numbers of tokens")
    offset = max(offsets, default=0)  # a purely recurrent model counts from here
    pairs = zip(caches, sample.layers, strict=True)
    cache = MTPCache([_wrapped_layer(inner, like, name, scope, offset) for inner, like in pairs])
    cache.last_id_alone = sample.last_id_alone
    return cache


def _is_empty(inner: Any) -> bool:
    """Whether a layer has no rows."""
    return all(part.empty() for part in _parts(inner))


def _wrapped_layer(inner: Any, like: Any, name: str, scope: StepScope, offset: int) -> Any:
    """Wrap the cache or the caches of a layer if they have the shape of ``like``."""
    pairs = list(zip(_parts(inner), getattr(like, "caches", [like]), strict=False))
    other = f"{name} was made with another model: "
    if isinstance(inner, lm_cache.CacheList) != isinstance(like, LayerCacheList):
        raise ValueError(f"{other}it has a {type(inner).__name__} where this model has another one")
    parts = []
    for part, own in pairs:
        if isinstance(part, lm_cache.ArraysCache) != isinstance(own, RecurrentLayerCache):
            raise ValueError(f"{other}its recurrent layers are others")
        if isinstance(own, RecurrentLayerCache):
            parts.append(_wrapped_slots(part, own, other, offset))
        else:
            parts.append(_wrapped(part, own, name, scope))
    return LayerCacheList(parts) if isinstance(inner, lm_cache.CacheList) else parts[0]


def _wrapped_slots(
    inner: Any, like: RecurrentLayerCache, other: str, offset: int
) -> RecurrentLayerCache:
    """Wrap an ``ArraysCache`` if its slots have the shapes of ``like``, and give them its types."""
    slots = like.slots()
    if len(inner.cache) != len(slots):
        raise ValueError(f"{other}its recurrent layers have {len(inner.cache)} states")
    for index, (value, own) in enumerate(zip(inner.cache, slots, strict=True)):
        if value is None or own is None:
            continue
        if value.shape != own.shape:
            raise ValueError(
                f"{other}a recurrent state has shape {tuple(value.shape)}, "
                f"this model's has {tuple(own.shape)}"
            )
        inner.cache[index] = value.astype(own.dtype)
    return RecurrentLayerCache.from_mlx_lm(inner, offset=offset)


def _wrapped(inner: Any, like: LayerCache, name: str, scope: StepScope) -> LayerCache:
    """Wrap a cache of mlx-lm if it has the shape of ``like``."""
    quantised = isinstance(inner, lm_cache.QuantizedKVCache)
    rotating = isinstance(inner, lm_cache.RotatingKVCache)
    chunked = isinstance(inner, lm_cache.ChunkedKVCache)
    if not (quantised or rotating or chunked or type(inner) is lm_cache.KVCache):
        raise ValueError(f"{name} contains a {type(inner).__name__}, which cannot be rewound")
    own_window = like.window if isinstance(like, WindowLayerCache) else None
    if rotating and own_window and (inner.max_size, inner.keep) != (own_window, 0):
        raise ValueError(
            f"{name} was made with another model: it has a window of {inner.max_size} tokens, "
            f"this model has one of {own_window}"
        )
    if chunked != isinstance(like, ChunkLayerCache) or (chunked and inner.chunk_size != own_window):
        raise ValueError(f"{name} was made with another model: it attends within other chunks")
    if not inner.empty():
        _check_shape(inner, like, name)
    if chunked:
        return ChunkLayerCache.from_mlx_lm(inner, scope=scope)
    if rotating:
        return WindowLayerCache.from_mlx_lm(inner, scope=scope)
    return (QuantizedLayerCache if quantised else LayerCache)(inner, scope=scope)


def _check_shape(inner: Any, like: LayerCache, name: str) -> None:
    """Check the rows of a cache of mlx-lm against ``like``, and give them its type."""
    keys, values = like.inner.keys_and_values()
    if isinstance(inner, lm_cache.QuantizedKVCache):
        inner.keys, inner.values = list(inner.keys or ()), list(inner.values or ())
        dims = tuple(x[1].shape[-1] * inner.group_size for x in (inner.keys, inner.values))
        batch, heads = inner.keys[0].shape[:2]
    else:
        dims, (batch, heads) = (inner.keys.shape[-1], inner.values.shape[-1]), inner.keys.shape[:2]
        inner.keys, inner.values = inner.keys.astype(keys.dtype), inner.values.astype(values.dtype)
    expected = (keys.shape[1], keys.shape[-1], values.shape[-1])
    if batch != 1:
        raise ValueError(f"{name} has the tokens of {batch} prompts, where one is needed")
    if (heads, *dims) != expected:
        raise ValueError(
            f"{name} was made with another model: its keys have {heads} heads of {dims[0]}, "
            f"this model's have {expected[0]} of {expected[1]}"
        )
