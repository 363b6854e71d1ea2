"""The caches of a model: made new, read from a file, or around those of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.caches.layers import LayerCache, QuantizedLayerCache, WindowLayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.wrappers import WindowLayer


def unsupported_reason(base: nn.Module) -> str | None:
    """Return why a model's caches cannot be rewound, or None if they can."""
    for layer in lm_cache.make_prompt_cache(base):
        if type(layer) is lm_cache.KVCache:
            continue
        if type(layer) is lm_cache.RotatingKVCache and layer.keep == 0:
            continue
        kind = type(layer).__name__
        if not layer.is_trimmable():
            return f"it has recurrent or hybrid layers, whose state ({kind}) cannot be rewound"
        return f"its cache ({kind}) cannot be rewound exactly"
    return None


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
    layers: list[LayerCache] = []
    modules: Any = base.layers
    for layer, inner in zip(modules, lm_cache.make_prompt_cache(base), strict=True):
        if isinstance(inner, lm_cache.RotatingKVCache):
            layers.append(WindowLayerCache(window=inner.max_size, scope=scope))
        elif isinstance(layer, WindowLayer) and kv_bits is None:
            layers.append(WindowLayerCache(window=layer.window, scope=scope))
        elif max_kv_size is not None:
            layers.append(WindowLayerCache(window=max_kv_size - 4, keep=4, scope=scope))
        else:
            layers.append(LayerCache(inner, scope=scope))
    return MTPCache(
        layers,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )


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
    if any(inner.empty() for inner in saved):
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
    pairs = zip(caches, sample.layers, strict=True)
    layers = [_wrapped(inner, like, name, scope) for inner, like in pairs]
    if len({layer.offset for layer in layers}) > 1:
        raise ValueError(f"{name} has layers with different numbers of tokens")
    return MTPCache(layers)


def _wrapped(inner: Any, like: LayerCache, name: str, scope: StepScope) -> LayerCache:
    """Wrap a cache of mlx-lm if it has the shape of ``like``."""
    quantised = isinstance(inner, lm_cache.QuantizedKVCache)
    rotating = isinstance(inner, lm_cache.RotatingKVCache)
    if not (quantised or rotating or type(inner) is lm_cache.KVCache):
        raise ValueError(f"{name} contains a {type(inner).__name__}, which cannot be rewound")
    own_window = like.window if isinstance(like, WindowLayerCache) else None
    if rotating and own_window and (inner.max_size, inner.keep) != (own_window, 0):
        raise ValueError(
            f"{name} was made with another model: it has a window of {inner.max_size} tokens, "
            f"this model has one of {own_window}"
        )
    if not inner.empty():
        _check_shape(inner, like, name)
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
