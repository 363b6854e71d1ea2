"""Key/value caches: step masks in, exact rewind out.

mlx-lm's caches keep the keys and values; a thin wrapper per layer adds what a step needs: the
attention mask of its layout, and a rewind that is a plain trim because ordinary rows come first.
Sliding-window layers keep their window plus some slack and forget older rows only between steps,
so that no rewind ever needs a row that is gone.  What cannot be rewound is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import cache as lm_cache

from mlx_mtp.backends.metal.attention_layer import StepAttention, attention_of
from mlx_mtp.model.layout import StepLayout, StepScope

WINDOW_SLACK = 256


class LayerCache:
    """Keys and values of one layer, rewindable, aware of the step in progress.

    Attributes:
        inner: mlx-lm's ``KVCache`` or ``QuantizedKVCache`` that holds the arrays.
        attention: what may attend in place of mlx-lm; see ``attention_hook``.
    """

    def __init__(
        self, inner: Any, *, scope: StepScope, attention: StepAttention | None = None
    ) -> None:
        self.inner = inner
        self.scope = scope
        self.attention = attention

    @property
    def offset(self) -> int:
        """Position of the next row."""
        return self.inner.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append ``[B, H, L, D]`` keys and values; return all that are held."""
        return self.inner.update_and_fetch(keys, values)

    def keys_and_values(self) -> Any:
        """All keys and values that are held."""
        return self.inner.keys_and_values()

    def make_mask(
        self, num_rows: int, *, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Attention mask ``[L, held + L]`` of the step in progress, in the form mlx-lm expects."""
        if not self.scope.has_masks:
            return self.inner.make_mask(
                num_rows, return_array=return_array, window_size=window_size
            )
        layout = self.scope.layout
        assert isinstance(layout, StepLayout) and layout.num_rows == num_rows
        if window_size is not None:
            return self._window_mask(mx.arange(self.offset), window_size, keep=0)
        return mx.pad(layout.attention, [(0, 0), (self.offset, 0)], constant_values=True)

    def rewind(self, num_rows: int) -> None:
        """Forget the last rows."""
        trimmed = self.inner.trim(num_rows)
        assert trimmed == num_rows, f"rewound {trimmed} rows of {num_rows}"

    def can_rewind(self, num_rows: int) -> bool:
        """Whether that many rows can be forgotten exactly."""
        return num_rows <= self.offset

    def begin_step(self) -> None:
        """Forget what no later row can see."""

    def copied(self) -> LayerCache:
        """The same rows in a cache that goes its own way; it takes memory once one grows."""
        other = copy.copy(self)
        other.inner = copy.copy(self.inner)
        if not self.inner.empty():
            held = (self.inner.keys, self.inner.values)
            rows = tree_map(lambda x: x[..., : self.inner.offset, :], held)
            other.inner.keys, other.inner.values = rows
        return other

    @property
    def state(self) -> Any:
        """The arrays, for evaluation."""
        return () if self.inner.empty() else self.inner.keys_and_values()

    def _window_mask(self, held: mx.array, window: int, *, keep: int) -> mx.array:
        """Mask over held rows at the given positions, then the step's own rows."""
        layout = self.scope.layout
        assert isinstance(layout, StepLayout)
        rows = self.offset + layout.positions
        positions = mx.concatenate([held, rows])
        near = (rows[:, None] - positions[None] < window) | (positions < keep)
        return near & mx.pad(layout.attention, [(0, 0), (held.size, 0)], constant_values=True)


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
    """Keeps the first ``keep`` rows and the last ``window`` rows, and some slack to rewind into.

    Every row sees the kept rows and the ``window`` rows up to itself, however rows are grouped
    into steps.  Rows out of sight are dropped between steps, in blocks.
    """

    def __init__(
        self,
        *,
        window: int,
        keep: int = 0,
        scope: StepScope,
        attention: StepAttention | None = None,
    ) -> None:
        super().__init__(lm_cache.KVCache(), scope=scope, attention=attention)
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
        """Attention mask ``[L, held + L]``; the cache's own window stands in for the model's."""
        del return_array, window_size
        held = mx.arange(self.inner.offset)
        held = mx.where(held < self.keep, held, held + self.dropped)
        if self.scope.has_masks:
            return self._window_mask(held, self.window, keep=self.keep)
        rows = mx.arange(self.offset, self.offset + num_rows)
        positions = mx.concatenate([held, rows])[None]
        near = (rows[:, None] - positions < self.window) | (positions < self.keep)
        return near & (positions <= rows[:, None])

    def can_rewind(self, num_rows: int) -> bool:
        """Whether the rows that the new end would see are all still held."""
        if self.dropped == 0:
            return num_rows <= self.offset
        return self.inner.offset - num_rows - self.keep >= self.window - 1

    def begin_step(self) -> None:
        """Drop rows out of sight once there is a block of them."""
        surplus = self.inner.offset - self.keep - self.window
        if surplus < WINDOW_SLACK:
            return
        keys, values = (
            mx.concatenate([x[..., : self.keep, :], x[..., self.keep + surplus :, :]], axis=-2)
            for x in self.inner.keys_and_values()
        )
        self.inner.state = (keys, values, self.inner.offset - surplus)
        self.dropped += surplus


class MTPCache:
    """The caches of all layers, moved together."""

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
        self.kv_group_size = kv_group_size
        self.quantized_kv_start = quantized_kv_start

    @property
    def offset(self) -> int:
        """Rows held, which is the position of the next row."""
        return self.layers[0].offset

    @property
    def state(self) -> list[Any]:
        """All arrays, for evaluation."""
        return [layer.state for layer in self.layers]

    def begin_step(self) -> None:
        """Forget what is out of sight; quantise once the context is long enough."""
        for layer in self.layers:
            layer.begin_step()
        if self._awaits_quantisation and self.offset >= self.quantized_kv_start:
            self.layers = [self._quantise(layer) for layer in self.layers]

    @property
    def rows_until_change(self) -> int | None:
        """Rows that may still be added before the cache changes its form (None: no limit).

        A step must not cross that border, or a row's result would depend on its step.
        """
        if not self._awaits_quantisation:
            return None
        return max(self.quantized_kv_start - self.offset, 0) or None

    def rewind(self, num_rows: int) -> None:
        """Forget the last rows of every layer.

        Raises:
            ValueError: rows that would be needed again are no longer held.
        """
        if num_rows == 0:
            return
        if not self.can_rewind(num_rows):
            raise ValueError(f"cannot rewind {num_rows} of {self.offset} rows")
        for layer in self.layers:
            layer.rewind(num_rows)

    def can_rewind(self, num_rows: int) -> bool:
        """Whether every layer can forget that many rows exactly."""
        return all(layer.can_rewind(num_rows) for layer in self.layers)

    def copied(self) -> MTPCache:
        """The same rows in caches that go their own way."""
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
    """Say why a model's caches cannot be rewound, or None if they can."""
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
        max_kv_size: keep the first 4 rows and the last ``max_kv_size - 4`` only.
        kv_bits: quantise keys and values to that many bits ...
        kv_group_size: ... in groups of that size ...
        quantized_kv_start: ... from that context length on.

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
    seams: Any = {"scope": scope, "attention": attention_of(base)}
    for inner in lm_cache.make_prompt_cache(base):
        if isinstance(inner, lm_cache.RotatingKVCache):
            layers.append(WindowLayerCache(window=inner.max_size, **seams))
        elif max_kv_size is not None:
            layers.append(WindowLayerCache(window=max_kv_size - 4, keep=4, **seams))
        else:
            layers.append(LayerCache(inner, **seams))
    if kv_bits is not None and any(isinstance(layer, WindowLayerCache) for layer in layers):
        raise ValueError("kv_bits cannot be combined with a sliding window or max_kv_size")
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
        sample: caches of this model that hold at least one row, for their shapes and types.
        scope: the model's step scope.

    Returns:
        The caches and the file's metadata (``model``, ``tokenizer_config``).

    Raises:
        ValueError: the file cannot be read, or was not made with a model of this shape.
    """
    try:
        held, metadata = lm_cache.load_prompt_cache(str(path), return_metadata=True)
    except Exception as error:  # mlx raises many kinds for a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a prompt cache: {reason}") from None
    if len(held) != len(sample.layers):
        raise ValueError(
            f"{path} was made with another model: it has {len(held)} layers, "
            f"this model has {len(sample.layers)}"
        )
    pairs = zip(held, sample.layers, strict=True)
    return MTPCache([_adopt(inner, like, path, scope) for inner, like in pairs]), metadata


def _adopt(inner: Any, like: LayerCache, path: Path, scope: StepScope) -> LayerCache:
    """Take over one layer of a prompt cache file if it has the shape of ``like``."""
    if isinstance(like, WindowLayerCache) or type(inner) not in _HELD:
        raise ValueError(f"{path} holds a {type(inner).__name__}, which cannot be rewound")
    if inner.empty():
        raise ValueError(f"{path} holds an empty prompt cache")
    keys, values = like.inner.keys_and_values()
    if isinstance(inner, lm_cache.QuantizedKVCache):
        inner.keys, inner.values = list(inner.keys or ()), list(inner.values or ())
        given = tuple(x[1].shape[-1] * inner.group_size for x in (inner.keys, inner.values))
        heads = inner.keys[0].shape[1]
    else:
        given, heads = (inner.keys.shape[-1], inner.values.shape[-1]), inner.keys.shape[1]
        rows = inner.offset
        inner.state = (inner.keys.astype(keys.dtype), inner.values.astype(values.dtype), rows)
    wanted = (keys.shape[1], keys.shape[-1], values.shape[-1])
    if (heads, *given) != wanted:
        raise ValueError(
            f"{path} was made with another model: its keys have {heads} heads of {given[0]}, "
            f"this model's have {wanted[0]} of {wanted[1]}"
        )
    if isinstance(inner, lm_cache.QuantizedKVCache):
        return QuantizedLayerCache(inner, scope=scope)
    return LayerCache(inner, scope=scope, attention=like.attention)


_HELD = (lm_cache.KVCache, lm_cache.QuantizedKVCache)
