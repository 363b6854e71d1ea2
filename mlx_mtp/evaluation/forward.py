"""The two parts of a forward over mask blocks of a sequence.

Ordinary rows are computed once, without gradient: they do not depend on the adapter.  Their keys
and values, and the states of recurrent layers after them (``recurrent_rows``), then serve all mask
blocks of the sequence, whose rows run through the same modules as in decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache, KVCache

from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.recurrent_rows import RecordedRows, StatesAtAnchors
from mlx_mtp.model.caches.cache_list import LayerCacheList
from mlx_mtp.model.caches.layers import ChunkLayerCache
from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import RowLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.noise import mask_ids


@dataclass(frozen=True)
class KeysAndValues:
    """Keys and values of a layer for a sequence, both ``[1, H, L, Dh]``.

    Attributes:
        chunk: number of positions of a chunk that rows attend within, None for all.
    """

    keys: mx.array
    values: mx.array
    chunk: int | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """Both, for evaluation."""
        return [self.keys, self.values]

    @property
    def num_values(self) -> int:
        """Values per row."""
        return sum(x.shape[1] * x.shape[-1] for x in self.arrays)


Memory = KeysAndValues | RecordedRows | list[Any]
"""What a layer remembers; a layer with several caches has a list of these."""


@dataclass(frozen=True)
class OrdinaryRows:
    """The base model's output for a sequence, without gradient.

    Attributes:
        hidden: final hidden states ``[L, D]``.
        layers: what each layer remembers of the sequence.
    """

    hidden: mx.array
    layers: Sequence[Memory]

    @property
    def arrays(self) -> list[Any]:
        """All arrays, for evaluation."""
        return [self.hidden, *(part.arrays for part in self._parts())]

    @property
    def num_values(self) -> list[int]:
        """Values per row of each layer's keys and values."""
        return [
            sum(part.num_values for part in _flat(layer) if isinstance(part, KeysAndValues))
            for layer in self.layers
        ]

    def _parts(self) -> Iterator[KeysAndValues | RecordedRows]:
        for layer in self.layers:
            yield from _flat(layer)


@dataclass(frozen=True)
class FixedCaches:
    """The caches of a forward over one sequence, one per layer."""

    layers: Sequence[Any]

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Do nothing: the caches know the rows."""


class FixedLayerCache:
    """A layer cache of a sequence that mask rows see but do not change.

    Attributes:
        offset: 0, because mask rows have their positions in the sequence.
        start_position: position of the first row.
        carried: all keys and values, which a layer may leave for later ones.
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
        self.carried: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the cached rows followed by the new ones, ``[1, H, L + R, Dh]``."""
        self.carried = (
            mx.concatenate([self._keys, keys], axis=-2),
            mx.concatenate([self._values, values], axis=-2),
        )
        return self.carried

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The same once more, for a layer that shares them."""
        assert self.carried is not None
        return self.carried

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
    """Run the base model over a sequence ``[L]``; ``gradient`` keeps that of what layers store."""

    def recording(cache: Any) -> Any:
        if isinstance(cache, LayerCacheList):
            return [recording(part) for part in cache.caches]
        if isinstance(cache, RecurrentLayerCache):
            return RecordedRows(cache.num_slots, gradient=gradient)
        if isinstance(cache, ChunkLayerCache):
            return ChunkedKVCache(cache.window)
        return KVCache()

    caches = [recording(cache) for cache in model.make_cache().layers]
    hidden = model(ids[None], cache=FixedCaches(caches))[0]
    detached = (lambda x: x) if gradient else mx.stop_gradient

    def memory(cache: Any) -> Memory:
        if isinstance(cache, list):
            return [memory(part) for part in cache]
        if isinstance(cache, RecordedRows):
            return cache
        if cache.empty():  # a layer without attention
            return []
        keys, values = map(detached, cache.keys_and_values())
        return KeysAndValues(keys, values, getattr(cache, "chunk_size", None))

    return OrdinaryRows(hidden=mx.stop_gradient(hidden), layers=[memory(x) for x in caches])


def mask_rows(model: MTPModel, ordinary: OrdinaryRows, rows: MaskRows) -> mx.array:
    """Run mask blocks of a sequence; rows after the last anchor are ignored.

    Returns:
        Final hidden states ``[R, D]``, block by block.
    """
    seen = max(rows.anchors) + 1

    def fixed(memory: Memory) -> Any:
        if isinstance(memory, list):
            return [fixed(part) for part in memory]
        if isinstance(memory, RecordedRows):
            return StatesAtAnchors(memory, rows)
        keys, values = (x[..., :seen, :] for x in (memory.keys, memory.values))
        return FixedLayerCache(keys, values, rows, chunk=memory.chunk)

    ids = mx.array(mask_ids(model.config, rows.mask_offsets, rows.row_positions)[None])
    layers = [fixed(memory) for memory in ordinary.layers]
    return model(ids, cache=FixedCaches(layers), layout=rows)[0]


def draft_states(model: MTPModel, ordinary: OrdinaryRows, rows: MaskRows) -> mx.array:
    """Compute the states whose logits are those of the drafts, by mask rows or by heads.

    Args:
        model: with its adapter.
        ordinary: the sequence's ordinary rows.
        rows: drafts after some anchors, as mask blocks.

    Returns:
        ``[R, D]``, block by block; with gradients of the adapter only.
    """
    if model.heads is None:
        return mask_rows(model, ordinary, rows)
    if model.heads.remembers:
        states, places = model.heads(ordinary.hidden[None, : max(rows.anchors) + 1]), rows.anchors
    else:
        states = model.heads(ordinary.hidden[mx.array(rows.anchors)][None])
        places = range(len(rows.anchors))
    blocks = mx.array(list(places))[mx.array(rows.row_blocks)]
    return states[mx.array(rows.mask_offsets), blocks]


def _flat(memory: Memory) -> Iterator[KeysAndValues | RecordedRows]:
    """The parts of a layer's memory."""
    for part in memory if isinstance(memory, list) else [memory]:
        yield from _flat(part) if isinstance(part, list) else [part]
