"""The caches of several answers as one: rows are split before attention and joined after it.

A model only passes the values of these caches on, to its rotary embeddings and to attention; the
seam in attention (``attention``) calls back ``BatchLayerCache.attend``.  Those in recurrent layers
(``recurrence``, ``row_by_row``) call back ``BatchRecurrentCache``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.model.caches.cache_list import LayerCacheList
from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import BatchLayout, RowLayout, StepLayout, StepScope
from mlx_mtp.model.recurrence import RecurrenceCall, StepRecurrence
from mlx_mtp.model.row_by_row import Outputs, Slots, TakeRows


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


class BatchRecurrentCache:
    """The caches of several answers for one recurrent layer.

    The mixer reads no state and starts a text; each answer's rows then continue its own state.
    """

    lengths = None  # of mlx-lm's batches
    left_padding = None

    def __init__(self, layers: Sequence[RecurrentLayerCache], layout: BatchLayout) -> None:
        self._layers = layers
        self._layout = layout

    @property
    def offset(self) -> PerAnswer:
        """Positions of the next rows; wrapped rotary embeddings take those of the layout."""
        return PerAnswer(self._layout.offsets)

    def __getitem__(self, slot: int) -> None:
        """Return no state."""
        if slot >= self._layers[0].num_slots:  # some mixers unpack the slots
            raise IndexError(slot)

    def __setitem__(self, slot: int, value: Any) -> None:
        """Ignore a state: the seams store that of each answer."""

    def make_mask(self, num_rows: int, **options: Any) -> None:
        """Return no mask, because there is no padding."""
        del num_rows, options

    def advance(self, num_rows: int) -> None:
        """Ignore mlx-lm's count of rows."""

    def convolve(self, slot: int, conv: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Convolve each answer's rows after its own last inputs; see ``recurrence.StateCache``."""
        num_before = x.shape[1] - self._layout.num_rows
        parts = []
        for layer, rows in self._answers(x[:, num_before:], axis=1):
            before = layer[slot]
            if before is None:
                before = mx.zeros((1, num_before, x.shape[2]), x.dtype)
            inputs = mx.concatenate([before, rows], axis=1)
            parts.append(layer.convolve(slot, conv, inputs))
            layer[slot] = inputs[:, inputs.shape[1] - num_before :]
        return self._layout.pack(parts, axis=1)

    def recur(self, call: RecurrenceCall, step: StepRecurrence | None) -> tuple[mx.array, None]:
        """Run a recurrence over each answer's rows; see ``recurrence.StateCache``."""
        axis = call.recurrence.axis
        columns: Any = [self._layout.unpack(rows, axis=axis) for rows in call.rows.values()]
        parts = []
        for layer, *rows in zip(self._layers, *columns, strict=True):
            own = call.with_rows(dict(zip(call.rows, rows, strict=True)))
            y, state = layer.recur(own, step)
            layer[layer.num_slots - 1] = state
            parts.append(y)
        return self._layout.pack(parts, axis=axis), None

    def run_mixer(self, call: TakeRows) -> Outputs:
        """Run each answer's rows through a mixer without a seam; see ``row_by_row.MixerCache``."""
        outputs = []
        for index, layer in enumerate(self._layers):

            def own(
                rows_of: Callable[[mx.array], mx.array],
                slots: Slots,
                layout: RowLayout | None,
                index: int = index,
            ) -> tuple[Outputs, Slots]:
                def own_rows(x: mx.array) -> mx.array:
                    return rows_of(self._layout.unpack(x, axis=1)[index])

                return call(own_rows, slots, layout)

            outputs.append(layer.run_mixer(own))
        return [self._layout.pack(list(parts), axis=1) for parts in zip(*outputs, strict=True)]

    def _answers(
        self, rows: mx.array, *, axis: int
    ) -> Iterator[tuple[RecurrentLayerCache, mx.array]]:
        """The cache and the rows of each answer."""
        return zip(self._layers, self._layout.unpack(rows, axis=axis), strict=True)


class BatchCacheList:
    """The caches of several answers for a layer with several, which takes them by index."""

    def __init__(self, caches: Sequence[BatchLayerCache | BatchRecurrentCache]) -> None:
        self.caches = caches

    def __getitem__(self, index: int) -> BatchLayerCache | BatchRecurrentCache:
        return self.caches[index]

    @property
    def offset(self) -> PerAnswer:
        """Positions of the next rows."""
        return self.caches[0].offset


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
        self.layers = [_together(layers, layout, scope) for layers in by_layer]

    def begin_forward(self, num_rows: int, layout: Any) -> None:
        """Begin a forward of all answers' rows."""
        del num_rows, layout
        for cache, step in zip(self._caches, self._layouts, strict=True):
            cache.begin_forward(step.num_rows, step)


def _together(layers: Sequence[Any], layout: BatchLayout, scope: StepScope) -> Any:
    """Make the cache of one layer in a batch."""
    if isinstance(layers[0], LayerCacheList):
        parts = zip(*(layer.caches for layer in layers), strict=True)
        return BatchCacheList([_together(part, layout, scope) for part in parts])
    if isinstance(layers[0], RecurrentLayerCache):
        return BatchRecurrentCache(layers, layout)
    return BatchLayerCache(layers, layout, scope)
