"""Key/value caches that know a step's attention mask and can be rewound exactly.

mlx-lm's caches store the keys and values; a thin wrapper per layer adds the attention mask of a
step's layout, and a rewind that is a plain trim because ordinary rows come first.  Sliding-window
layers store their window plus some slack and drop older rows only between steps, so that no rewind
needs a row that was dropped.  Caches that cannot be rewound are refused.

``MTPCache`` can also wrap a list of mlx-lm's caches (``from_mlx_lm``), and is itself a sequence of
them, so that mlx-lm's ``save_prompt_cache`` and ``trim_prompt_cache`` take it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.layout import StepLayout, StepScope
from mlx_mtp.model.wrappers import WindowLayer

WINDOW_SLACK = 256


class ForwardLayerCache(Protocol):
    """What a model's layer asks of its cache during a forward.

    A cache may also have ``attend`` (see ``batch_cache``); then the layer's keys, values and masks
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


class Caches(Protocol):
    """The caches of a forward: one answer's, those of a batch, or those of training."""

    @property
    def layers(self) -> Sequence[ForwardLayerCache]:
        """One cache per layer."""
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
        if not self.scope.has_masks:
            return self.inner.make_mask(
                num_rows, return_array=return_array, window_size=window_size
            )
        layout = self.scope.layout
        assert isinstance(layout, StepLayout) and layout.num_rows == num_rows
        if window_size is not None:
            return self._window_mask(mx.arange(self.offset), num_rows, window_size, keep=0)
        return mx.pad(layout.attention, [(0, 0), (self.offset, 0)], constant_values=True)

    def rewind(self, num_rows: int) -> None:
        """Drop the last rows."""
        trimmed = self.inner.trim(num_rows)
        assert trimmed == num_rows, f"rewound {trimmed} rows of {num_rows}"

    def can_rewind(self, num_rows: int) -> bool:
        """Whether that many rows can be dropped exactly."""
        return num_rows <= self.offset

    @property
    def surplus(self) -> int:
        """Number of stored rows that no later row can see."""
        return 0

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
        layout = self.scope.layout if self.scope.has_masks else None
        if layout is None:
            places, sees = mx.arange(num_rows), mx.tri(num_rows, dtype=mx.bool_)
        else:
            assert isinstance(layout, StepLayout)
            places, sees = layout.positions, layout.attention
        rows = self.offset + places
        positions = mx.concatenate([stored, rows])
        near = (rows[:, None] - positions[None] < window) | (positions < keep)
        return near & mx.pad(sees, [(0, 0), (stored.size, 0)], constant_values=True)


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
        """Attention mask ``[L, S + L]`` of the cache's window, and of the model's if it has one."""
        del return_array
        stored = mx.arange(self.inner.offset)
        stored = mx.where(stored < self.keep, stored, stored + self.dropped)
        mask = self._window_mask(stored, num_rows, self.window, keep=self.keep)
        layout = self.scope.layout
        if (
            self.keep
            and isinstance(layout, StepLayout)
            and layout.num_rows == layout.num_pending > 1
        ):
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
        surplus = self.surplus
        if surplus < WINDOW_SLACK:
            return
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
            surplus = max(0, rows - size)
            keys, values = (
                mx.concatenate([x[..., : self.keep, :], x[..., self.keep + surplus :, :]], axis=-2)
                for x in self.inner.keys_and_values()
            )
            cache.state = (keys, values, self.offset, self.keep, size, rows - surplus)
        return cache


class RotatingKVCache(lm_cache.RotatingKVCache):
    """mlx-lm's cache with the rows of a layer; trimming it rewinds the layer.

    The name is mlx-lm's, because ``save_prompt_cache`` writes the name of the class.
    """

    def __init__(self, layer: WindowLayerCache) -> None:
        super().__init__(layer.window + layer.keep, keep=layer.keep)
        self._layer = layer

    def is_trimmable(self) -> bool:
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


class MTPCache:
    """The caches of all layers of one answer.

    As a sequence it has mlx-lm's caches of the layers, so that ``save_prompt_cache`` and
    ``trim_prompt_cache`` of mlx-lm take it.

    Attributes:
        next_id: the last id of an answer, which follows the cached rows, as far as it is known;
            added when the layers are used as a sequence.
    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
    ) -> None:
        self.layers = list(layers)
        self.kv_bits = kv_bits
        self.next_id: int | None = None
        self._model: Any = None
        self._first_offset: int | None = None
        self.quantise_from(quantized_kv_start, bits=kv_bits, group_size=kv_group_size)

    def quantise_from(self, start: int, *, bits: int | None, group_size: int) -> None:
        """Quantise before the next step once there are ``start`` rows.

        Raises:
            ValueError: there is a window, or the cache is already quantised in another way.
        """
        if bits is not None and any(isinstance(layer, WindowLayerCache) for layer in self.layers):
            raise ValueError("kv_bits cannot be combined with a sliding window or max_kv_size")
        layer = self.layers[0]
        if bits is not None and isinstance(layer, QuantizedLayerCache):
            actual = f"{layer.bits} bits in groups of {layer.group_size}"
            if actual != f"{bits} bits in groups of {group_size}":
                raise ValueError(
                    f"kv_bits {bits} and kv_group_size {group_size} do not match the cache, which "
                    f"has {actual}"
                )
        self.kv_bits = bits
        self.kv_group_size = group_size
        self.quantized_kv_start = start

    @property
    def offset(self) -> int:
        """Number of rows so far, which is the position of the next row."""
        return self.layers[0].offset

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        self.add_next()
        if isinstance(index, slice):
            return [layer.to_mlx_lm() for layer in self.layers[index]]
        return self.layers[index].to_mlx_lm()

    def end_answer(self, last_id: int | None, model: Any) -> None:
        """Remember the last id of an answer, and the model that can add it."""
        self.next_id, self._model = last_id, model

    def add_next(self) -> None:
        """Add the last id of an answer, as mlx-lm does, if it is known."""
        if self.next_id is None:
            return
        ids, self.next_id = mx.array([[self.next_id]]), None
        self.begin_step()
        self._model(ids, cache=self)
        mx.eval(self.state)

    @property
    def state(self) -> list[Any]:
        """All arrays, for evaluation."""
        return [layer.state for layer in self.layers]

    def begin_answer(self) -> None:
        """Leave the cache as it is until a step has added rows, as mlx-lm does."""
        self._first_offset = self.offset

    def begin_step(self) -> None:
        """Drop rows that are out of sight; quantise once the context is long enough."""
        if self.offset == self._first_offset:
            return
        self._first_offset = None
        for layer in self.layers:
            layer.begin_step()
        if self._awaits_quantisation and self.offset >= self.quantized_kv_start:
            self.quantise()

    def quantise(self) -> None:
        """Quantise the keys and values now, and all later ones."""
        self.layers = [self._quantise(layer) for layer in self.layers]

    @property
    def drops_rows(self) -> bool:
        """Whether ``begin_step`` will drop rows."""
        return any(layer.surplus >= WINDOW_SLACK for layer in self.layers)

    @property
    def rows_until_change(self) -> int | None:
        """Rows that may be added before the cache is quantised; None without a limit.

        A step must not cross that border, or a row's result would depend on its step.
        """
        if not self._awaits_quantisation:
            return None
        return max(self.quantized_kv_start - self.offset, 1)

    @property
    def chunks_matter(self) -> bool:
        """Whether results depend on where a prompt is cut; it is then cut as mlx-lm does."""
        keeps = any(isinstance(layer, WindowLayerCache) and layer.keep for layer in self.layers)
        return self._awaits_quantisation or keeps

    def rest_after_chunk(self, num_left: int, limit: int) -> int:
        """Return how many of ``num_left`` ids of a prompt are left after its next chunk.

        If chunks matter, the last id is on its own.
        """
        return max(num_left - limit, int(num_left > 1 and self.chunks_matter))

    def rewind(self, num_rows: int) -> None:
        """Drop the last rows of every layer.

        Raises:
            ValueError: rows that would be needed again were dropped.
        """
        self.next_id = None
        if num_rows == 0:
            return
        if not self.can_rewind(num_rows):
            raise ValueError(f"cannot rewind {num_rows} of {self.offset} rows")
        for layer in self.layers:
            layer.rewind(num_rows)

    def can_rewind(self, num_rows: int) -> bool:
        """Whether every layer can drop that many rows exactly."""
        return all(layer.can_rewind(num_rows) for layer in self.layers)

    def copied(self) -> MTPCache:
        """Make an independent copy."""
        other = copy.copy(self)
        other.layers = [layer.copied() for layer in self.layers]
        return other

    @property
    def _awaits_quantisation(self) -> bool:
        return self.kv_bits is not None and not isinstance(self.layers[0], QuantizedLayerCache)

    def _quantise(self, layer: LayerCache) -> LayerCache:
        inner = layer.inner.to_quantized(group_size=self.kv_group_size, bits=self.kv_bits)
        if not inner.empty():
            inner.keys, inner.values = list(inner.keys), list(inner.values)
        return QuantizedLayerCache(inner, scope=layer.scope)


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
