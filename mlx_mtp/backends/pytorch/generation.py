"""Plain generation for many prompts at once, by transformers' model in PyTorch.

All rows of a batch are at the same position, so that no step needs a mask and attention reads only
what it uses: prompts are sorted by length, and those longer than the shortest one are read along
with the first steps.  Rows that ended are removed from the cache; rows that are left when a batch
is nearly done wait for the next batch to come to their position, and join it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from mlx_mtp.backends.pytorch.model import refusal, torch_model
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.text.ending import GrowingText

Draw = Callable[[np.ndarray], int]  # logits [V] to an id
_MAX_BATCH, _MAX_CACHE_BYTES = 128, 3 << 30
_GROWTH = 128  # positions by which a cache grows
_PREFILL_ROWS = 4096  # of one forward
_FEW = 0.2  # fraction of a full batch below which rows wait for the next one
_CLOSE = 8  # candidates for the most likely id, whose logits in bfloat16 may be equal


class TorchGenerator:
    """Generates texts like ``evaluation.batch_generation.generate_batch``.

    Args:
        model: its base model is copied to PyTorch; an adapter is not used.
        dtype: of the weights; None is ``torch_dtype``.
        device: None is ``torch_device``.

    Raises:
        ValueError: PyTorch is missing, or does not compute what this model computes.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._model = torch_model(model, dtype=dtype, device=device)
        self._windows = _windows(model, self._model.config)
        self._head = self._model.get_output_embeddings()
        self._last_hidden: torch.Tensor | None = None
        self._head.register_forward_pre_hook(self._keep_hidden)

    @property
    def dtype(self) -> str:
        """Type of the numbers, such as "bfloat16"."""
        return str(self._model.dtype).removeprefix("torch.")

    def max_batch_size(self, max_tokens: int) -> int:
        """Number of texts of a length whose keys and values take little memory."""
        config = self._model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = 2 * len(self._windows) * heads * dims * max_tokens * self._model.dtype.itemsize
        return max(8, min(_MAX_BATCH, _MAX_CACHE_BYTES // row))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stops: Iterable[Sequence[int]],
        batch_size: int,
        draws: Sequence[Draw] | None = None,
        loop_length: int | None = None,
        on_step: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, list[int], str]]:
        """Continue prompts; see ``generate_batch``.

        The order of the results, and rounding, depend on the prompts and ``batch_size`` only.
        """
        stops = [list(stop) for stop in stops]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rows = [
            _Row(
                index,
                list(prompts[index]),
                GrowingText(max_tokens=max_tokens, stops=stops, loop_length=loop_length),
                None if draws is None else draws[index],
            )
            for index in order
        ]
        pending = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        waiting: list[_Batch] = []
        batch: _Batch | None = None
        while pending or waiting or batch:
            if batch is None:
                batch = self._begin(pending.pop(0)) if pending else waiting.pop(0)
            for other in [each for each in waiting if each.length == batch.length]:
                waiting.remove(other)
                batch.join(other)
            if pending and len(batch.rows) <= _FEW * batch_size and batch.is_read:
                waiting = sorted([*waiting, batch], key=lambda each: each.length)
                batch = None
                continue
            yield from self._step(batch, on_step)
            batch = batch if batch.rows else None

    @torch.no_grad()
    def _begin(self, rows: list[_Row]) -> _Batch:
        """Read all ids but the last that every prompt of a batch has."""
        length = len(rows[0].ids) - 1
        batch = _Batch([], self._new_cache())
        at_once = max(1, _PREFILL_ROWS // max(length, 1))
        for start in range(0, len(rows), at_once):
            part = _Batch(rows[start : start + at_once], self._new_cache())
            if length:
                ids = torch.tensor([row.ids[:length] for row in part.rows])
                self._model.base_model(input_ids=ids.to(self._model.device), cache=part.cache)
            batch.join(part)
        return batch

    @torch.no_grad()
    def _step(
        self, batch: _Batch, on_step: Callable[[int], None]
    ) -> list[tuple[int, list[int], str]]:
        """One more id for every row; returns the texts that ended."""
        rows, position = batch.rows, batch.length
        ids = torch.tensor([[row.ids[position]] for row in rows], device=self._model.device)
        logits = self._model(input_ids=ids, cache=batch.cache, logits_to_keep=1).logits[:, 0]
        new = [place for place, row in enumerate(rows) if len(row.ids) == position + 1]
        tokens = self._choose(logits, new, [rows[place].draw for place in new])
        ended: list[tuple[int, list[int], str]] = []
        finished: list[int] = []
        for place, token in zip(new, tokens, strict=True):
            row = rows[place]
            row.ids.append(token)
            if reason := row.text.add(token):
                ended.append((row.index, row.text.ids, reason))
                finished.append(place)
        for place in reversed(finished):
            batch.drop(place)
        if new:
            on_step(len(new))
        return ended

    def _choose(
        self, logits: torch.Tensor, places: list[int], draws: list[Draw | None]
    ) -> list[int]:
        """Ids for the rows of some places, drawn or the most likely ones.

        In bfloat16 several logits are often equal: the best ones are computed again in float32.
        """
        if not places:
            return []
        chosen = logits if len(places) == len(logits) else logits[places]
        if draws[0] is not None:
            values = chosen.float().cpu().numpy()
            return [draw(row) for draw, row in zip(draws, values, strict=True) if draw]
        if chosen.dtype == torch.float32:
            return chosen.argmax(dim=-1).tolist()
        assert self._last_hidden is not None
        hidden = self._last_hidden[:, -1][places].float()  # [n, D]
        close = chosen.topk(min(_CLOSE, chosen.shape[-1]), dim=-1).indices  # [n, 8]
        scores = (self._head.weight[close].float() @ hidden[..., None])[..., 0]
        if self._head.bias is not None:
            scores += self._head.bias[close].float()
        return close.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0].tolist()

    def _keep_hidden(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        del module
        self._last_hidden = inputs[0]

    def _new_cache(self) -> Cache:
        return Cache(layers=[_Layer(window) for window in self._windows])


@dataclass
class _Row:
    """A text: the index of its prompt, prompt and new ids, and what draws them (None: greedy)."""

    index: int
    ids: list[int]
    text: GrowingText
    draw: Draw | None


class _Batch:
    """Rows at the same position, and their cache."""

    def __init__(self, rows: list[_Row], cache: Cache) -> None:
        self.rows = rows
        self.cache = cache
        self._layers: list[_Layer] = list(cache.layers)  # pyright: ignore

    @property
    def length(self) -> int:
        """Number of positions that were read."""
        return self._layers[0].length

    @property
    def is_read(self) -> bool:
        """Whether all prompts were read."""
        return all(len(row.ids) == self.length + 1 for row in self.rows)

    def join(self, other: _Batch) -> None:
        """Append the rows of another batch at the same position."""
        for layer, more in zip(self._layers, other._layers, strict=True):
            layer.join(more)
        self.rows = self.rows + other.rows

    def drop(self, place: int) -> None:
        """Remove a row; the last one takes its place."""
        for layer in self._layers:
            layer.drop(place)
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last


class _Layer(CacheLayerMixin):
    """Keys and values of a layer, in buffers ``[R, H, P, D]`` with places for further positions.

    transformers' own layers copy all keys and values at every step.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.length = 0
        self._num_rows = 0
        self._buffers: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._num_rows = len(key_states)
        self._buffers = [
            states.new_empty(*states.shape[:2], 0, states.shape[3])
            for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append positions; returns keys and values of those that the new ones may see."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, end = self._first(), self.length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._resize(self._num_rows, -(-end // _GROWTH) * _GROWTH)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._num_rows, :, self.length : end] = states
        self.length = end
        keys, values = (buffer[: self._num_rows, :, first:end] for buffer in self._buffers)
        return keys, values

    def join(self, other: _Layer) -> None:
        """Append the rows of a layer at the same position."""
        if not self._num_rows:
            self.length, self._num_rows = other.length, other._num_rows
            self._buffers, self.is_initialized = other._buffers, other.is_initialized
            return
        assert self.length == other.length
        start, end = self._num_rows, self._num_rows + other._num_rows
        if end > self._buffers[0].shape[0]:
            self._resize(end, self._buffers[0].shape[2])
        for buffer, more in zip(self._buffers, other._buffers, strict=True):
            buffer[start:end, :, : self.length] = more[: other._num_rows, :, : self.length]
        self._num_rows = end

    def drop(self, place: int) -> None:
        """Remove a row; the last one takes its place."""
        self._num_rows -= 1
        for buffer in self._buffers:
            if place < self._num_rows:
                buffer[place, :, : self.length] = buffer[self._num_rows, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number and offset of the positions that ``update`` returns."""
        return self.length + query_length - self._first(), self._first()

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _first(self) -> int:
        """The first position that the next one sees."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)

    def _resize(self, num_rows: int, num_positions: int) -> None:
        """Move to larger buffers."""
        for number, buffer in enumerate(self._buffers):
            new = buffer.new_empty(num_rows, buffer.shape[1], num_positions, buffer.shape[3])
            used = slice(self._num_rows), slice(None), slice(self.length)
            new[used] = buffer[used]
            self._buffers[number] = new


def _windows(model: MTPModel, config: Any) -> list[int | None]:
    """The window of every layer, None without one.

    Raises:
        ValueError: a layer keeps something else than keys and values.
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            raise refusal(model, f"its cache has a {type(layer).__name__}")
    return windows or [None] * config.num_hidden_layers
