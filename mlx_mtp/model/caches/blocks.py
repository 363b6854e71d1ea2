"""Caches cut into blocks of rows that several answers can share, and joined again.

A block has the state of all layers at consecutive positions, copied out of a cache, so that it
keeps no other memory alive.  Whatever a layer remembers as rows (keys and values, quantised or not,
with a window or without) can be cut at any row.  A recurrent layer has no rows but a state, which
is known at a few positions only.  A block that ends at one of them can have it, and a cache of
such a model may end there and nowhere else (``can_end``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.model.caches.layers import LayerCache, WindowLayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel

Rows = Mapping[str, mx.array]
"""Tensors ``[1, H, rows, ...]`` by name: ``LAYER.keys``, or ``LAYER.keys.PART`` if quantised.

The state of a recurrent layer after the last row is in ``LAYER.slot.NUMBER``, of any shape.
"""

Signature = dict[str, tuple[mx.Dtype, tuple[int, ...]]]
"""Type and shape, of rows without their number, of each tensor of a block."""

_SIDES = ("keys", "values")
_SLOT = ".slot."
_FREE_ROWS = 256  # of a joined cache, so that the next step does not copy it once more


class CacheBlocks:
    """Cuts and joins the caches of one model.

    Args:
        model: the model.
        chunk_size: rows per chunk of a prompt.
        options: options of ``model.make_cache``.

    Attributes:
        has_states: whether there are recurrent layers, so that a cache can only end where a block
            has their states.
    """

    def __init__(self, model: MTPModel, *, chunk_size: int, **options: Any) -> None:
        self._model = model
        self._chunk_size = chunk_size
        self._options = options
        sample = self.make_cache()
        self._chunks_matter = sample.chunks_hide_rows
        self._quantised_start = sample.quantized_kv_start
        self.has_states = model.is_recurrent

    def make_cache(self) -> MTPCache:
        """Make a cache without rows."""
        return self._model.make_cache(**self._options)

    def cut(self, cache: MTPCache, start: int, end: int) -> Rows | None:
        """Copy the rows of positions ``start`` to ``end``; None if a layer has dropped some.

        Recurrent layers add nothing; see ``states``.
        """
        rows = {}
        for index, layer in enumerate(cache.attention_layers):
            first = _stored_index(layer, start, end)
            if first is None:
                return None
            for side in _SIDES:
                for name, value in _named(f"{index}.{side}", getattr(layer.inner, side)):
                    rows[name] = _copied(value, first, first + end - start)
        mx.eval(rows)
        return rows

    def states(self, cache: MTPCache, position: int) -> Rows:
        """The states of recurrent layers after ``position`` rows; empty if these are not known."""
        states = {}
        for index, layer in enumerate(cache.recurrent_layers):
            slots = layer.slots_at(position)
            if slots is None:
                return {}
            named = enumerate(slots)
            states |= {f"{index}{_SLOT}{n}": mx.contiguous(x) for n, x in named if x is not None}
        mx.eval(states)
        return states

    def extended(self, first: Rows, second: Rows) -> Rows | None:
        """Append rows to a block without its states; None if only one of them is quantised."""
        first = without_states(first)
        if first.keys() != second.keys():
            return None
        rows = {
            name: mx.concatenate([value, second[name]], axis=-2) for name, value in first.items()
        }
        mx.eval(rows)
        return rows

    def num_shared(self, cache: MTPCache, num_prompt: int) -> int:
        """Number of first rows of a cache that another answer may use.

        Where results depend on the chunks of a prompt, these are the rows of whole chunks.

        Args:
            cache: the cache.
            num_prompt: number of ids of the answer's prompt.
        """
        if not self._chunks_matter:
            return cache.offset
        return min(cache.offset, num_prompt) // self._chunk_size * self._chunk_size

    def is_chunk_end(self, position: int) -> bool:
        """Whether a chunk of a prompt may end at ``position`` without changing any result."""
        return not self._chunks_matter or position % self._chunk_size == 0

    def can_end(self, rows: Rows, position: int, *, end: int) -> bool:
        """Whether a cache may end at ``position``, which is in this block or at its end.

        A cache that ends before the position from which caches are quantised is not quantised yet.

        Args:
            rows: the block.
            position: the number of rows of the cache.
            end: the position after the last row of the block.
        """
        if self.has_states and not (position == end and has_states(rows)):
            return False
        if not self.is_chunk_end(position):
            return False
        return not _is_quantised(rows) or position >= self._quantised_start

    def join(self, blocks: Sequence[Rows], num_rows: int) -> MTPCache:
        """Make a cache of the first ``num_rows`` rows of consecutive blocks, the first at 0."""
        cache = self.make_cache()
        if _is_quantised(blocks[-1]):
            cache.quantise()
        for index, layer in enumerate(cache.attention_layers):
            keys, values = (
                self._joined(cache, blocks, f"{index}.{side}", num_rows) for side in _SIDES
            )
            _restore(layer, keys, values, num_rows)
        for index, layer in enumerate(cache.recurrent_layers):
            names = [f"{index}{_SLOT}{n}" for n in range(layer.num_slots)]
            layer.restore(num_rows, [blocks[-1].get(name) for name in names])
        cache.begin_step()  # as after the step that computed the last of these rows
        return cache

    def signatures(self) -> list[Signature]:
        """Return what blocks of this model look like, quantised ones included."""
        cache = self.make_cache()
        self._model(mx.array([[0]]), cache=cache)
        samples = [self.cut(cache, 0, 1)]
        if cache.kv_bits is not None:
            cache.quantise()
            samples.append(self.cut(cache, 0, 1))
        found = [signature(rows) for rows in samples if rows is not None]
        if not self.has_states:
            return found
        states = signature(self.states(cache, 1))
        return [*found, *(each | states for each in found)]

    def _joined(
        self, cache: MTPCache, blocks: Sequence[Rows], name: str, num_rows: int
    ) -> list[mx.array]:
        """The rows of one side of a layer: one array, or three if the cache is quantised."""
        parts = [
            [value for _, value in _parts(rows, name)]
            if f"{name}.0" in rows or not _is_quantised(blocks[-1])
            else list(mx.quantize(rows[name], group_size=cache.kv_group_size, bits=cache.kv_bits))
            for rows in blocks
        ]
        columns = zip(*parts, strict=True)
        return [mx.concatenate(list(column), axis=-2)[..., :num_rows, :] for column in columns]


def signature(rows: Rows) -> Signature:
    """Return the types and shapes of a block, without its number of rows."""
    return {name: (value.dtype, own_shape(name, value.shape)) for name, value in rows.items()}


def own_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor without its number of rows, if it has rows."""
    return shape if is_state(name) else (*shape[:-2], *shape[-1:])


def is_state(name: str) -> bool:
    """Whether a tensor of a block is a state, which has no rows."""
    return _SLOT in name


def has_states(rows: Rows) -> bool:
    """Whether a block has the states after its last row."""
    return any(map(is_state, rows))


def without_states(rows: Rows) -> Rows:
    """The same block without states."""
    return {name: value for name, value in rows.items() if not is_state(name)}


def num_bytes(rows: Rows) -> int:
    """Memory of a block."""
    return sum(value.nbytes for value in rows.values())


def _is_quantised(rows: Rows) -> bool:
    return "0.keys.0" in rows


def _named(name: str, value: Any) -> Iterator[tuple[str, mx.array]]:
    """The arrays of one side of a layer by name."""
    if isinstance(value, mx.array):
        yield name, value
    else:
        yield from ((f"{name}.{part}", array) for part, array in enumerate(value))


def _parts(rows: Rows, name: str) -> Iterator[tuple[str, mx.array]]:
    names = [name] if name in rows else [f"{name}.{part}" for part in range(3)]
    yield from ((each, rows[each]) for each in names)


def _copied(value: mx.array, start: int, end: int) -> mx.array:
    """Rows that share no memory with the cache."""
    if value.shape[1] == 1:  # the slice is contiguous already and would be a view of all rows
        return mx.take(value, mx.arange(start, end), axis=-2)
    return mx.contiguous(value[..., start:end, :])


def _stored_index(layer: LayerCache, start: int, end: int) -> int | None:
    """Where a layer stores the row of position ``start``; None if rows up to ``end`` are gone."""
    if not isinstance(layer, WindowLayerCache) or layer.dropped == 0 or end <= layer.keep:
        return start
    return start - layer.dropped if start >= layer.keep + layer.dropped else None


def _restore(
    layer: LayerCache, keys: list[mx.array], values: list[mx.array], num_rows: int
) -> None:
    """Put rows into an empty layer; one with a window takes those that later rows can see."""
    inner, dropped = layer.inner, 0
    if len(keys) > 1:
        inner.keys, inner.values, inner.offset = keys, values, num_rows
        return
    if isinstance(layer, WindowLayerCache):
        dropped = layer.dropped = max(0, num_rows - layer.window - layer.keep)
    for side, (rows,) in zip(_SIDES, (keys, values), strict=True):
        parts = [rows]
        if isinstance(layer, WindowLayerCache) and dropped:
            parts = [rows[..., : layer.keep, :], rows[..., layer.keep + dropped :, :]]
        free = mx.zeros((*rows.shape[:-2], _FREE_ROWS, rows.shape[-1]), rows.dtype)
        setattr(inner, side, mx.concatenate([*parts, free], axis=-2))
    inner.offset = num_rows - dropped
