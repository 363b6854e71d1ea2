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
from mlx_lm.models.cache import KVCache

from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.caches.layers import ForwardLayerCache
from mlx_mtp.model.layout import RowLayout
from mlx_mtp.model.mtp_model import MTPModel


@dataclass(frozen=True)
class OrdinaryRows:
    """The base model's output for a sequence, without gradient.

    Attributes:
        hidden: final hidden states ``[L, D]``.
        keys_and_values: of every layer, both ``[1, H, L, Dh]``.
    """

    hidden: mx.array
    keys_and_values: Sequence[tuple[mx.array, mx.array]]


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
    """

    offset = 0

    def __init__(self, keys: mx.array, values: mx.array, rows: MaskRows) -> None:
        self._keys = keys
        self._values = values
        self._rows = rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the cached rows followed by the new ones, ``[1, H, L + R, Dh]``."""
        return (
            mx.concatenate([self._keys, keys], axis=-2),
            mx.concatenate([self._values, values], axis=-2),
        )

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Attention mask ``[R, L + R]`` of the mask rows."""
        del return_array
        assert num_rows == self._rows.num_rows
        return self._rows.attention(self._keys.shape[-2], window_size)


def ordinary_rows(model: MTPModel, ids: mx.array, *, gradient: bool = False) -> OrdinaryRows:
    """Run the base model over a sequence ``[L]``; ``gradient`` keeps that of keys and values."""
    caches = [KVCache() for _ in model.base.layers]
    hidden = model(ids[None], cache=FixedCaches(caches))[0]
    pairs: Any = [layer.keys_and_values() for layer in caches]
    if not gradient:
        pairs = [(mx.stop_gradient(keys), mx.stop_gradient(values)) for keys, values in pairs]
    return OrdinaryRows(hidden=mx.stop_gradient(hidden), keys_and_values=pairs)


def mask_rows(model: MTPModel, ordinary: OrdinaryRows, rows: MaskRows) -> mx.array:
    """Run mask blocks of a sequence; rows after the last anchor are ignored.

    Returns:
        Final hidden states ``[R, D]``, block by block.
    """
    seen = max(rows.anchors) + 1
    layers = [
        FixedLayerCache(keys[..., :seen, :], values[..., :seen, :], rows)
        for keys, values in ordinary.keys_and_values
    ]
    ids = mx.array(rows.mask_offsets[None])
    return model(ids, cache=FixedCaches(layers), layout=rows)[0]
