"""The two halves of a training forward.

Ordinary rows are computed once, without gradient: they are the base model's own, whatever the
adapter is.  Their keys and values then serve all mask blocks of the sequence, whose rows run
through the very modules that decode, so that what is trained is what will run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel


@dataclass(frozen=True)
class OrdinaryRows:
    """What the base model makes of a sequence; no gradient flows into it.

    Attributes:
        hidden: final hidden states ``[L, D]``.
        keys_and_values: of every layer, ``[1, H, L, Dh]`` each.
    """

    hidden: mx.array
    keys_and_values: Sequence[tuple[mx.array, mx.array]]


class HeldRows:
    """A layer cache that holds a sequence and never changes: mask rows see it and are forgotten.

    Attributes:
        offset: 0, because mask rows carry positions in the sequence, not behind it.
    """

    offset = 0

    def __init__(self, keys: mx.array, values: mx.array, rows: MaskRows) -> None:
        self._keys = keys
        self._values = values
        self._rows = rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the held rows followed by the given ones, ``[1, H, L + R, Dh]``."""
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
    """Run the base model over a sequence ``[L]``; a gradient flows only where it is asked for."""
    caches: Any = [KVCache() for _ in model.base.layers]
    held = cast(MTPCache, SimpleNamespace(layers=caches))
    hidden = model(ids[None], cache=held)[0]
    pairs = [cache.keys_and_values() for cache in caches]
    if not gradient:
        pairs = [(mx.stop_gradient(keys), mx.stop_gradient(values)) for keys, values in pairs]
    return OrdinaryRows(hidden=mx.stop_gradient(hidden), keys_and_values=pairs)


def mask_rows(model: MTPModel, ordinary: OrdinaryRows, rows: MaskRows) -> mx.array:
    """Run mask blocks of a sequence; the rows behind the last anchor are not looked at.

    Returns:
        Final hidden states ``[R, D]``, block by block.
    """
    seen = max(rows.anchors) + 1
    layers: Any = [
        HeldRows(keys[..., :seen, :], values[..., :seen, :], rows)
        for keys, values in ordinary.keys_and_values
    ]
    held = cast(MTPCache, SimpleNamespace(layers=layers))
    ids = mx.array(rows.mask_offsets[None])
    return model(ids, cache=held, layout=rows)[0]
