"""The two parts of a forward over mask blocks of a sequence.

Ordinary rows are computed once, without gradient: they do not depend on the adapter.  Their keys
and values then serve all mask blocks of the sequence, whose rows run through the same modules as in
decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache, KVCache, make_prompt_cache

from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.caches.layers import ForwardLayerCache
from mlx_mtp.model.layout import RowLayout
from mlx_mtp.model.mtp_model import MTPModel


@dataclass(frozen=True)
class OrdinaryRows:
    """The base model's output for a sequence, without gradient.

    Attributes:
        hidden: final hidden states ``[L, D]``.
        keys_and_values: of every layer with a cache of its own, both ``[1, H, L, Dh]``.
        chunks: number of positions of a chunk of each such layer, None if it has none.
    """

    hidden: mx.array
    keys_and_values: Sequence[tuple[mx.array, mx.array]]
    chunks: Sequence[int | None]


@dataclass(frozen=True)
class FixedCaches:
    """The caches of a forward over one sequence, one per layer."""

    layers: Sequence[ForwardLayerCache]

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Do nothing: the caches know the rows."""


class FixedLayerCache:
    """A layer cache of a sequence that mask rows see but do not change.

    Attributes:
        offset: 0, because mask rows have their positions in the sequence.
        start_position: position of the first row.
    """

    offset = 0
    start_position = 0

    def __init__(
        self, keys: mx.array, values: mx.array, rows: MaskRows, *, chunk: int | None = None
    ) -> None:
        self._keys = keys
        self._values = values
        self._rows = rows
        self._chunk = chunk
        self._all: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the cached rows followed by the new ones, ``[1, H, L + R, Dh]``."""
        self._all = (
            mx.concatenate([self._keys, keys], axis=-2),
            mx.concatenate([self._values, values], axis=-2),
        )
        return self._all

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The same once more, for a layer that shares them."""
        assert self._all is not None
        return self._all

    def maybe_trim_front(self) -> None:
        """Drop nothing."""

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Attention mask ``[R, L + R]`` of the mask rows."""
        del return_array
        assert num_rows == self._rows.num_rows
        return self._rows.attention(self._keys.shape[-2], window_size, chunk=self._chunk)


def ordinary_rows(model: MTPModel, ids: mx.array, *, gradient: bool = False) -> OrdinaryRows:
    """Run the base model over a sequence ``[L]``; ``gradient`` keeps that of keys and values."""
    stock = make_prompt_cache(model.base)
    chunks = [cache.chunk_size if isinstance(cache, ChunkedKVCache) else None for cache in stock]
    caches = [KVCache() if chunk is None else ChunkedKVCache(chunk) for chunk in chunks]
    hidden = model(ids[None], cache=FixedCaches(caches))[0]
    pairs: Any = [layer.keys_and_values() for layer in caches]
    if not gradient:
        pairs = [(mx.stop_gradient(keys), mx.stop_gradient(values)) for keys, values in pairs]
    hidden = mx.stop_gradient(hidden)
    return OrdinaryRows(hidden=hidden, keys_and_values=pairs, chunks=chunks)


def mask_rows(model: MTPModel, ordinary: OrdinaryRows, rows: MaskRows) -> mx.array:
    """Run mask blocks of a sequence; rows after the last anchor are ignored.

    Returns:
        Final hidden states ``[R, D]``, block by block.
    """
    seen = max(rows.anchors) + 1
    layers = [
        FixedLayerCache(keys[..., :seen, :], values[..., :seen, :], rows, chunk=chunk)
        for (keys, values), chunk in zip(ordinary.keys_and_values, ordinary.chunks, strict=True)
    ]
    ids = mx.array(rows.mask_offsets[None])
    return model(ids, cache=FixedCaches(layers), layout=rows)[0]
