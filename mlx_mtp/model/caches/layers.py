"""The cache of one layer: keys and values that know a step's attention mask and can be rewound.

mlx-lm's caches store the keys and values; a thin wrapper per layer adds the attention mask of a
step's layout, and a rewind that is a plain trim because ordinary rows come first.  Sliding-window
layers store their window plus some slack and drop older rows only between steps, so that no rewind
needs a row that was dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.layout import RowLayout, StepScope

WINDOW_SLACK = 256


class ForwardLayerCache(Protocol):
    """What a model's layer asks of its cache during a forward.

    A cache may also have ``attend`` (see ``caches.batch``); then the layer's keys, values and masks
    are passed to it, one part per answer.
    """

    @property
    def offset(self) -> Any:
        """Position of the next row; it is passed on to the rotary embedding."""
        ...

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append ``[B, H, L, Dh]`` keys and values; return all keys and values."""
        ...

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> Any:
        """Make the attention mask of the forward in progress; called before the first layer."""
        ...


class LayerCache:
    """Rewindable keys and values of one layer, which know the step in progress.

    Attributes:
        inner: mlx-lm's ``KVCache`` or ``QuantizedKVCache``, which stores the arrays.
    """

    def __init__(self, inner: Any, *, scope: StepScope) -> None:
        self.inner = inner
        self.scope = scope

    @property
    def offset(self) -> int:
        """Position of the next row."""
        return self.inner.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append ``[B, H, L, Dh]`` keys and values; return all keys and values."""
        return self.inner.update_and_fetch(keys, values)

    def keys_and_values(self) -> Any:
        """All keys and values, ``[B, H, S, Dh]`` each."""
        return self.inner.keys_and_values()

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Attention mask ``[L, S + L]`` of the step in progress, in the form mlx-lm expects."""
        layout = self.scope.step
        if layout is None:
            return self.inner.make_mask(
                num_rows, return_array=return_array, window_size=window_size
            )
        assert layout.num_rows == num_rows
        if window_size is not None:
            return self._window_mask(mx.arange(self.offset), num_rows, window_size, keep=0)
        return mx.pad(layout.attention, [(0, 0), (self.offset, 0)], constant_values=True)

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Begin a forward of some rows, which are in the model's step scope."""
        del num_rows, layout

    def rewind(self, num_rows: int) -> None:
        """Drop the last rows."""
        trimmed = self.inner.trim(num_rows)
        assert trimmed == num_rows, f"rewound {trimmed} rows of {num_rows}"

    def can_rewind(self, num_rows: int) -> bool:
        """Whether that many rows can be dropped exactly."""
        return num_rows <= self.offset

    def keep_rows(self, rows: Sequence[int], *, of: int) -> None:
        """Keep some of the last rows and drop the others.

        Args:
            rows: indices among the last ones, ascending.
            of: number of the last rows.
        """
        first = next((place for place, row in enumerate(rows) if row != place), len(rows))
        if moved := rows[first:]:
            start = self.inner.offset - of  # of the stored rows, of which some may be dropped
            sources = mx.array([start + row for row in moved])
            places = slice(start + first, start + len(rows))

            def compacted(x: mx.array) -> mx.array:
                x[..., places, :] = mx.take(x, sources, axis=-2)
                return x

            inner = self.inner
            inner.keys, inner.values = tree_map(compacted, (inner.keys, inner.values))
        self.rewind(of - len(rows))

    @property
    def surplus(self) -> int:
        """Number of stored rows that no later row can see."""
        return 0

    @property
    def drops_rows(self) -> bool:
        """Whether ``begin_step`` will drop rows."""
        return self.surplus >= WINDOW_SLACK

    def begin_step(self) -> None:
        """Drop rows that no later row can see."""

    def copied(self) -> LayerCache:
        """Make an independent copy, which takes memory only once one of the two grows."""
        other = copy.copy(self)
        other.inner = copy.copy(self.inner)
        if not self.inner.empty():
            arrays = (self.inner.keys, self.inner.values)
            rows = tree_map(lambda x: x[..., : self.inner.offset, :], arrays)
            other.inner.keys, other.inner.values = rows
        return other

    @property
    def state(self) -> Any:
        """The arrays, for evaluation."""
        return () if self.inner.empty() else self.inner.keys_and_values()

    def to_mlx_lm(self, into: Any = None) -> Any:
        """Return the rows as a cache of mlx-lm, which shares them.

        Args:
            into: the cache that these rows came from, which is updated.
        """
        del into
        return self.inner

    def _window_mask(self, stored: mx.array, num_rows: int, window: int, *, keep: int) -> mx.array:
        """Mask ``[L, S + L]`` over stored rows at positions ``[S]``, then the forward's rows."""
        return self._positional_mask(
            stored, num_rows, lambda row, seen: (row - seen < window) | (seen < keep)
        )

    def _positional_mask(
        self,
        stored: mx.array,
        num_rows: int,
        near: Callable[[mx.array, mx.array], mx.array],
    ) -> mx.array:
        """The same, given which positions ``[1, S + L]`` rows at positions ``[L, 1]`` may see."""
        layout = self.scope.step
        if layout is None:
            places, sees = mx.arange(num_rows), mx.tri(num_rows, dtype=mx.bool_)
        else:
            places, sees = layout.positions, layout.attention
        rows = self.offset + places
        positions = mx.concatenate([stored, rows])
        sees = mx.pad(sees, [(0, 0), (stored.size, 0)], constant_values=True)
        return near(rows[:, None], positions[None]) & sees


class QuantizedLayerCache(LayerCache):
    """A layer cache whose keys and values are quantised; mlx-lm asks for bits and group size."""

    @property
    def bits(self) -> int:
        """Bits per element."""
        return self.inner.bits

    @property
    def group_size(self) -> int:
        """Elements per scale."""
        return self.inner.group_size


class WindowLayerCache(LayerCache):
    """Stores the first ``keep`` rows and the last ``window`` rows, and some slack to rewind into.

    Every row sees the first ``keep`` rows and the ``window`` rows up to itself, however rows are
    grouped into steps; only the rows of a prompt chunk see what they see in mlx-lm
    (``_chunk_mask``).  Rows out of sight are dropped between steps, in blocks.
    """

    def __init__(self, *, window: int, keep: int = 0, scope: StepScope) -> None:
        super().__init__(lm_cache.KVCache(), scope=scope)
        self.window = window
        self.keep = keep
        self.dropped = 0

    @property
    def offset(self) -> int:
        """Position of the next row, dropped rows counted."""
        return self.inner.offset + self.dropped

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Attention mask ``[L, S + L]`` of the cache's window, and of the model's if it has one.

        Raises:
            ValueError: the model's window is larger than its own cache's.
        """
        del return_array
        if self.keep == 0 and window_size is not None and window_size > self.window:
            # a row would see more in a prompt than when it is decoded, as in mlx-lm's plamo3
            raise ValueError(
                f"its mask has a window of {window_size} rows, while its cache stores {self.window}"
            )
        stored = mx.arange(self.inner.offset)
        stored = mx.where(stored < self.keep, stored, stored + self.dropped)
        mask = self._window_mask(stored, num_rows, self.window, keep=self.keep)
        layout = self.scope.layout
        if self.keep and layout is not None and layout.is_prompt_chunk:
            mask = self._chunk_mask(stored, num_rows)
        if window_size is not None and window_size < self.window + self.keep:
            mask &= self._window_mask(stored, num_rows, window_size, keep=0)
        return mask

    def _chunk_mask(self, stored: mx.array, num_rows: int) -> mx.array:
        """Mask ``[L, S + L]`` of a prompt chunk, with what its rows see in mlx-lm.

        A ``RotatingKVCache`` joins its first ``keep`` and its last rows, ``size - 1`` in all, with
        the chunk; a row then sees itself and the ``size - 1`` places before it.
        """
        size = self.keep + self.window
        shift = max(0, self.offset - (size - 1))
        rows = mx.arange(self.offset, self.offset + num_rows)
        positions = mx.concatenate([stored, rows])
        places = mx.where(positions < self.keep, positions, positions - shift)
        is_stored = (positions < self.keep) | (places >= self.keep)
        near = rows[:, None] - shift - places[None] < size
        return is_stored & near & (positions[None] <= rows[:, None])

    def can_rewind(self, num_rows: int) -> bool:
        """Whether all rows that the next row would see are still stored."""
        if self.dropped == 0:
            return num_rows <= self.offset
        return self.inner.offset - num_rows - self.keep >= self.window - 1

    @property
    def surplus(self) -> int:
        """Number of stored rows that no later row can see."""
        return self.inner.offset - self.keep - self.window

    def begin_step(self) -> None:
        """Drop rows out of sight once there is a block of them."""
        if not self.drops_rows:
            return
        surplus = self.surplus
        keys, values = (
            mx.concatenate([x[..., : self.keep, :], x[..., self.keep + surplus :, :]], axis=-2)
            for x in self.inner.keys_and_values()
        )
        self.inner.state = (keys, values, self.inner.offset - surplus)
        self.dropped += surplus

    @classmethod
    def from_mlx_lm(cls, inner: Any, *, scope: StepScope) -> WindowLayerCache:
        """Take over the rows of a ``RotatingKVCache``."""
        layer = cls(window=inner.max_size - inner.keep, keep=inner.keep, scope=scope)
        if not inner.empty():
            rows = (inner._temporal_order(x) for x in (inner.keys, inner.values))
            keys, values = (x[..., : min(inner.offset, x.shape[2]), :] for x in rows)
            layer.inner.state = (keys, values, keys.shape[2])
            layer.dropped = inner.offset - keys.shape[2]
        return layer

    def to_mlx_lm(self, into: Any = None) -> Any:
        """Return the first and the last rows as a ``RotatingKVCache``."""
        cache = RotatingKVCache(self) if into is None else into
        if not self.inner.empty():
            size, rows = self.keep + self.window, self.inner.offset
            keys, values = self._visible()
            cache.state = (keys, values, self.offset, self.keep, size, min(rows, size))
        return cache

    def _visible(self) -> list[mx.array]:
        """The keys and values that later rows can see."""
        surplus = max(0, self.surplus)
        return [
            mx.concatenate([x[..., : self.keep, :], x[..., self.keep + surplus :, :]], axis=-2)
            for x in self.inner.keys_and_values()
        ]


class ChunkLayerCache(WindowLayerCache):
    """Attention within chunks of positions (Llama 4): a row sees its own chunk's rows up to itself.

    A chunk's first rows are needed until its last row is decoded, so the last ``window`` rows are
    stored, as many as a chunk has.  mlx-lm's model reads ``start_position`` and makes the masks
    itself; steps with mask rows ask ``make_mask`` (``chunks.ChunkLayer``).
    """

    @property
    def start_position(self) -> int:
        """Position of the first stored row."""
        return self.dropped

    def maybe_trim_front(self) -> None:
        """Drop nothing: a step may be rewound (``begin_step``)."""

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Attention mask ``[L, S + L]`` of the chunks."""
        del return_array, window_size
        stored = self.dropped + mx.arange(self.inner.offset)
        return self._positional_mask(
            stored, num_rows, lambda row, seen: row // self.window == seen // self.window
        )

    @classmethod
    def from_mlx_lm(cls, inner: Any, *, scope: StepScope) -> ChunkLayerCache:
        """Take over the rows of a ``ChunkedKVCache``."""
        layer = cls(window=inner.chunk_size, scope=scope)
        if not inner.empty():
            keys, values = inner.keys_and_values()
            layer.inner.state = (keys, values, keys.shape[2])
            layer.dropped = inner.start_position
        return layer

    def to_mlx_lm(self, into: Any = None) -> Any:
        """Return the last rows as a ``ChunkedKVCache``."""
        cache = ChunkedKVCache(self) if into is None else into
        if not self.inner.empty():
            keys, values = self._visible()
            start = self.offset - keys.shape[2]
            cache.state = (keys, values, self.offset, self.window, start)
        return cache


class _LayerTrim:
    """Trims a cache of mlx-lm by rewinding the layer that it shows."""

    _layer: WindowLayerCache

    def is_trimmable(self) -> Any:
        """Whether the layer can drop a row."""
        return self._layer.can_rewind(1)

    def trim(self, n: int) -> int:
        """Drop up to ``n`` rows, as many as the layer can; return their number."""
        count = min(n, self._layer.offset)
        while not self._layer.can_rewind(count):
            count -= 1
        self._layer.rewind(count)
        self._layer.to_mlx_lm(self)
        return count


class RotatingKVCache(_LayerTrim, lm_cache.RotatingKVCache):
    """mlx-lm's cache with the rows of a layer; trimming it rewinds the layer.

    The name is mlx-lm's, because ``save_prompt_cache`` writes the name of the class.
    """

    def __init__(self, layer: WindowLayerCache) -> None:
        super().__init__(layer.window + layer.keep, keep=layer.keep)
        self._layer = layer


class ChunkedKVCache(_LayerTrim, lm_cache.ChunkedKVCache):
    """mlx-lm's cache with the rows of a layer, likewise."""

    def __init__(self, layer: ChunkLayerCache) -> None:
        super().__init__(layer.window)
        self._layer = layer
