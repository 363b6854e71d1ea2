"""Caches of several answers as one: rows part before attention and meet again behind it.

mlx-lm's models hand the cache, the mask and what the cache gives out to one function
(``attention_hook``), and ours for Linux CPUs (``dense_blocks``) ask the cache themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import base as lm_base

from mlx_mtp.model.cache import LayerCache, MTPCache
from mlx_mtp.model.layout import BatchLayout, StepScope


class Several:
    """One value for each answer; what does anything with it but hand it on, fails."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts


class BatchLayerCache:
    """One layer's caches of several answers, as a model sees them in a packed forward."""

    def __init__(self, layers: Sequence[LayerCache], layout: BatchLayout, scope: StepScope) -> None:
        self._layers = layers
        self._layout = layout
        self._scope = scope

    @property
    def offset(self) -> Several:
        """Positions of the next rows; the wrapped rotary embeddings know better."""
        return Several(self._layout.offsets)

    def make_mask(self, num_rows: int, **options: Any) -> Several:
        """The mask of each answer's step."""
        assert num_rows == self._layout.num_rows
        packed, masks = self._scope.layout, []
        try:
            for layer, layout in zip(self._layers, self._layout.layouts, strict=True):
                self._scope.layout = layout
                masks.append(layer.make_mask(layout.num_rows, **options))
        finally:
            self._scope.layout = packed
        return Several(masks)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Several, Several]:
        """Append the rows of ``[1, H, L, D]`` to the caches they belong to."""
        parts = zip(
            self._layers,
            self._layout.unpack(keys, axis=2),
            self._layout.unpack(values, axis=2),
            strict=True,
        )
        held = [layer.update_and_fetch(*pair) for layer, *pair in parts]
        return Several([each[0] for each in held]), Several([each[1] for each in held])

    def attention(
        self, queries: mx.array, keys: Several, values: Several, *, scale: float, mask: Several
    ) -> mx.array:
        """Attend as ``attention_hook`` asks for it, by each cache's own attention or mlx-lm's."""
        layers = iter(self._layers)

        def attend(*given: Any) -> mx.array:
            return _attend(next(layers), *given, scale=scale)

        return self.attend_each(attend, queries, keys, values, mask)

    def attend_each(
        self,
        attend: Callable[[mx.array, Any, Any, Any], mx.array],
        queries: mx.array,
        keys: Several,
        values: Several,
        mask: Several,
    ) -> mx.array:
        """Attend from each answer's rows of ``[1, H, L, D]`` to its own keys and values."""
        own = self._layout.unpack(queries, axis=2)
        each = zip(own, keys.parts, values.parts, mask.parts, strict=True)
        return self._layout.pack([attend(*one) for one in each], axis=2)


def _attend(
    layer: LayerCache, queries: mx.array, keys: Any, values: Any, mask: Any, *, scale: float
) -> mx.array:
    """What the layer's own attention gives, or mlx-lm's."""
    if layer.attention is not None:
        result = layer.attention(queries, keys, values, scale=scale, mask=mask)
        if result is not None:
            return result
    return lm_base.scaled_dot_product_attention(
        queries, keys, values, cache=layer, scale=scale, mask=mask
    )


class BatchCache:
    """The caches of several answers, in a packed forward.

    Args:
        caches: one for each answer.
        layout: the forward.
        scope: the model's step scope.
    """

    offset = 0  # rows of a packed layout know their positions

    def __init__(
        self, caches: Sequence[MTPCache], layout: BatchLayout, *, scope: StepScope
    ) -> None:
        each_layer = zip(*(cache.layers for cache in caches), strict=True)
        self.layers = [BatchLayerCache(layers, layout, scope) for layers in each_layer]
