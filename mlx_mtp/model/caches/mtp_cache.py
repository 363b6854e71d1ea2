"""The caches of all layers of one answer.

``MTPCache`` can also wrap a list of mlx-lm's caches (``make.from_mlx_lm``), and is itself a
sequence of them, so that mlx-lm's ``save_prompt_cache`` and ``trim_prompt_cache`` take it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlx_mtp.model.caches.cache_list import LayerCacheList
from mlx_mtp.model.caches.layers import (
    LayerCache,
    QuantizedLayerCache,
    WindowLayerCache,
)
from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import RowLayout

CHECKPOINT_MARGIN = 16  # a chat template may write other ids after a prompt's last message later
AnyLayerCache = LayerCache | RecurrentLayerCache | LayerCacheList


class Caches(Protocol):
    """The caches of a forward: one answer's, those of a batch, or those of training."""

    @property
    def layers(self) -> Sequence[Any]:
        """One cache per layer.

        It is a ``ForwardLayerCache`` in attention, a ``recurrence.StateCache`` in a recurrent
        layer, and has them by index in a layer with several.
        """
        ...

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Begin a forward; ``layout`` is as in ``MTPModel``."""
        ...


class MTPCache:
    """The caches of all layers of one answer.

    As a sequence it has mlx-lm's caches of the layers, so that ``save_prompt_cache`` and
    ``trim_prompt_cache`` of mlx-lm take it.

    Attributes:
        keeps_checkpoints: whether there are checkpoints at the end of prompts and shortly before.
        next_id: the last id of an answer, which follows the cached rows, as far as it is known;
            added when the layers are used as a sequence.
        drafter_memory: what drafters remember of the same text, by source; empty in copies.
        last_id_alone: whether the last id of a prompt goes through the model on its own, as in
            mlx-lm, because some layers compute one row in another form than several.
    """

    def __init__(
        self,
        layers: Sequence[AnyLayerCache],
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
    ) -> None:
        self.layers = list(layers)
        self.kv_bits = kv_bits
        self.keeps_checkpoints = False
        self.drafter_memory: dict[str, Any] = {}
        self.next_id: int | None = None
        self._model: Any = None
        self._first_offset: int | None = None
        self.last_id_alone = False
        self.quantise_from(quantized_kv_start, bits=kv_bits, group_size=kv_group_size)

    def quantise_from(self, start: int, *, bits: int | None, group_size: int) -> None:
        """Quantise before the next step once there are ``start`` rows.

        Raises:
            ValueError: there is a window, or the cache is already quantised in another way.
        """
        attention = self.attention_layers
        if bits is not None and any(isinstance(layer, WindowLayerCache) for layer in attention):
            raise ValueError("kv_bits cannot be combined with a sliding window or max_kv_size")
        layer = attention[0] if attention else None
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
    def attention_layers(self) -> list[LayerCache]:
        """The caches of keys and values."""
        return [part for part in self._parts if isinstance(part, LayerCache)]

    @property
    def recurrent_layers(self) -> list[RecurrentLayerCache]:
        """The caches of recurrent layers."""
        return [part for part in self._parts if isinstance(part, RecurrentLayerCache)]

    @property
    def _parts(self) -> Iterator[LayerCache | RecurrentLayerCache]:
        """All caches, those of layers with several one by one."""
        for layer in self.layers:
            yield from layer.caches if isinstance(layer, LayerCacheList) else [layer]

    @property
    def offset(self) -> int:
        """Number of rows so far, which is the position of the next row; 0 without layers."""
        return self.layers[0].offset if self.layers else 0

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

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Begin a forward; ``layout`` is as in ``MTPModel``."""
        for layer in self.layers:
            layer.begin_forward(num_rows, layout)

    def begin_answer(self) -> None:
        """Leave the cache as it is until a step has added rows, as mlx-lm does."""
        self._first_offset = self.offset

    def begin_step(self, num_prompt_left: int = 0) -> None:
        """Drop rows that are out of sight; quantise once the context is long enough.

        Args:
            num_prompt_left: number of ids left of a prompt; near its end there are checkpoints.
        """
        if self.keeps_checkpoints and 0 < num_prompt_left <= CHECKPOINT_MARGIN:
            self.checkpoint()
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
        return any(layer.drops_rows for layer in self.layers)

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
        return self.chunks_hide_rows or bool(self.recurrent_layers)

    @property
    def chunks_hide_rows(self) -> bool:
        """Whether what a row sees depends on where a prompt is cut, not only how it is rounded."""
        keeps = any(isinstance(x, WindowLayerCache) and x.keep for x in self.attention_layers)
        return self._awaits_quantisation or keeps

    def rest_after_chunk(self, num_left: int, limit: int) -> int:
        """Return how many of ``num_left`` ids of a prompt are left after its next chunk.

        If chunks matter, the last id is on its own.  If checkpoints are kept, a chunk ends where
        one is made.
        """
        alone = self.chunks_matter or self.last_id_alone
        rest = max(num_left - limit, int(num_left > 1 and alone))
        if self.keeps_checkpoints and self.recurrent_layers and num_left > CHECKPOINT_MARGIN:
            rest = max(rest, CHECKPOINT_MARGIN)
        return rest

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

    @property
    def supports_trees(self) -> bool:
        """Whether any of a step's drafts can stay, not only the first ones."""
        return not self.recurrent_layers

    def keep_rows(self, rows: Sequence[int], *, of: int) -> None:
        """Keep some of the last rows of every layer and drop the others.

        Where these are the first of them, that is a rewind; else rows move together.

        Args:
            rows: indices among the last ones, ascending.
            of: number of the last rows, all of the last forward.

        Raises:
            ValueError: a layer cannot move rows, or see ``rewind``.
        """
        if not rows or rows[-1] == len(rows) - 1:
            return self.rewind(of - len(rows))
        if not self.supports_trees:
            raise ValueError("recurrent layers cannot keep drafts of another branch")
        self.next_id = None
        for layer in self.attention_layers:
            layer.keep_rows(rows, of=of)

    def can_rewind(self, num_rows: int) -> bool:
        """Whether every layer can drop that many rows exactly."""
        return all(layer.can_rewind(num_rows) for layer in self.layers)

    def checkpoint(self) -> None:
        """Make it possible to rewind to here later, which recurrent layers cannot do by themselves.

        The last ``MAX_CHECKPOINTS`` of them are kept; each has the memory of the layers' states.
        """
        for layer in self.recurrent_layers:
            layer.checkpoint()

    def rewind_point(self, max_rows: int) -> int:
        """Return the largest number of rows, up to ``max_rows``, that the cache can be rewound to.

        0 means that it cannot be used for a text that shares only ``max_rows`` rows with it.
        """
        points = [min(max_rows, self.offset)]
        if recurrent := self.recurrent_layers:
            points += recurrent[0].rewind_points()
        exact = [x for x in points if x <= max_rows and self.can_rewind(self.offset - x)]
        return max(exact, default=0)

    def copied(self) -> MTPCache:
        """Make an independent copy."""
        other = copy.copy(self)
        other.layers = [layer.copied() for layer in self.layers]
        other.drafter_memory = {}
        return other

    @property
    def _awaits_quantisation(self) -> bool:
        attention = self.attention_layers
        is_quantised = any(isinstance(layer, QuantizedLayerCache) for layer in attention)
        return self.kv_bits is not None and bool(attention) and not is_quantised

    def _quantise(self, layer: AnyLayerCache) -> Any:
        if isinstance(layer, LayerCacheList):
            return LayerCacheList([self._quantise(part) for part in layer.caches])
        if isinstance(layer, RecurrentLayerCache):
            return layer
        inner = layer.inner.to_quantized(group_size=self.kv_group_size, bits=self.kv_bits)
        if not inner.empty():
            inner.keys, inner.values = list(inner.keys), list(inner.values)
        return QuantizedLayerCache(inner, scope=layer.scope)
