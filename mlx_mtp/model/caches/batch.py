"""The caches of several answers as one: rows are split before attention and joined after it.

A model only passes the values of these caches on, to its rotary embeddings and to attention; the
seam in attention (``attention``) calls back ``BatchLayerCache.attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import BatchLayout, StepLayout, StepScope


class PerAnswer:
    """One value per answer; any use of it but passing it on fails."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts


class BatchLayerCache:
    """The caches of several answers for one layer, as a model sees them in a batched forward."""

    def __init__(self, layers: Sequence[LayerCache], layout: BatchLayout, scope: StepScope) -> None:
        self._layers = layers
        self._layout = layout
        self._scope = scope

    @property
    def offset(self) -> PerAnswer:
        """Positions of the next rows; wrapped rotary embeddings take those of the layout."""
        return PerAnswer(self._layout.offsets)

    def make_mask(self, num_rows: int, **options: Any) -> PerAnswer:
        """Make the attention mask of each answer's step."""
        assert num_rows == self._layout.num_rows
        masks = [
            layer.make_mask(layout.num_rows, **options)
            for layer, layout in zip(self._layers, self._each_layout(), strict=True)
        ]
        return PerAnswer(masks)

    def _each_layout(self) -> Iterator[StepLayout]:
        """The layouts of the steps; each is that of the forward while its answer's turn lasts."""
        try:
            for layout in self._layout.layouts:
                self._scope.layout = layout
                yield layout
        finally:
            self._scope.layout = self._layout

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PerAnswer, PerAnswer]:
        """Append rows ``[1, H, L, D]`` to the caches they belong to; return all keys and values."""
        rows = zip(
            self._layers,
            self._layout.unpack(keys, axis=2),
            self._layout.unpack(values, axis=2),
            strict=True,
        )
        pairs = [layer.update_and_fetch(*pair) for layer, *pair in rows]
        return PerAnswer([keys for keys, _ in pairs]), PerAnswer([values for _, values in pairs])

    def call_each(self, block: Callable[..., mx.array], x: mx.array, mask: PerAnswer) -> mx.array:
        """Call an attention block for each answer: its rows ``[1, L, D]``, its mask, its cache."""
        answers = zip(self._layout.unpack(x, axis=1), mask.parts, self._layers, strict=True)
        turns = zip(answers, self._each_layout(), strict=True)
        return self._layout.pack([block(*answer) for answer, _ in turns], axis=1)

    def attend(
        self,
        attention: Callable[..., mx.array],
        queries: mx.array,
        keys: PerAnswer,
        values: PerAnswer,
        mask: PerAnswer,
    ) -> mx.array:
        """Attend from each answer's rows of ``[1, H, L, D]`` to its own keys and values.

        Args:
            attention: called with queries, keys, values, mask and cache of one answer.
            queries: of all rows.
            keys: from ``update_and_fetch``.
            values: likewise.
            mask: from ``make_mask``.
        """
        rows = self._layout.unpack(queries, axis=2)
        answers = zip(rows, keys.parts, values.parts, mask.parts, self._layers, strict=True)
        turns = zip(answers, self._each_layout(), strict=True)
        return self._layout.pack([attention(*answer) for answer, _ in turns], axis=2)


class BatchCache:
    """The caches of several answers, in a batched forward.

    Args:
        caches: one per answer.
        layout: the rows of the forward.
        scope: the model's step scope.
    """

    offset = 0  # the layout has the positions of the rows

    def __init__(
        self, caches: Sequence[MTPCache], layout: BatchLayout, *, scope: StepScope
    ) -> None:
        by_layer: Any = zip(*(cache.layers for cache in caches), strict=True)
        self._caches = caches
        self._layouts = layout.layouts
        self.layers = [BatchLayerCache(layers, layout, scope) for layers in by_layer]

    def begin_forward(self, num_rows: int, layout: Any) -> None:
        """Begin a forward of all answers' rows."""
        del num_rows, layout
        for cache, step in zip(self._caches, self._layouts, strict=True):
            cache.begin_forward(step.num_rows, step)
