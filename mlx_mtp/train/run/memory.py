"""How much memory a training run will take, before it takes it.

A step holds the model, the adapter with its gradients and AdamW's two moments, what the base model
made of one sequence, and what the mask rows of one forward leave behind for their gradient.  Every
further process that trains holds a model and a step of its own.

The factors below were fitted to peaks that MLX counted on a CPU in float32, for tiny models (width
128, 2 or 6 layers, 16 to 256 mask rows behind 256 or 1024 tokens, 2048 to 32768 ids, with and
without candidates); those without ``_CPU`` come from such runs with MLX's own exponentials and were
never compared with a GPU.  The program itself is not counted: on Linux a process took 0.45 GB more
than MLX counted.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.backends.cpu.fast_math import PIECE
from mlx_mtp.evaluation.forward import ordinary_rows
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.workers import worker_count
from mlx_mtp.train.settings import TrainSettings

MEMORY_SHARE = 0.9  # of a machine's memory; the rest is the system's
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_WIDE = 4  # bytes of a float32, in which logits and moments are kept

# Copies that one forward of mask rows keeps for its gradient.
_LAYER_OUTPUTS = 2.6  # of what every linear layer of a layer puts out
_LAYER_WIDTHS = 1.0  # of the layer's width
_SCORES = 1.25  # of the attention weights of every head
_KEYS = 1.0  # of the keys and values, held rows and mask rows in one
_LOGITS, _LOGITS_OF_HEAD = 3.9, 1.0  # of the logits, and more for each head
_LOGITS_CPU, _LOGITS_OF_HEAD_CPU, _LOGITS_OF_DIST_CPU = 4.2, 1.6, 3.7
_PIECE_CPU = 3.0  # of the logits that ``fast_math`` takes at once
_CHOOSING = 4.0  # of the logits, where candidates are chosen from them
_CANDIDATES = 4.0  # of the logits of the candidates
_GRADIENTS = 2.0  # of the adapter: the sum so far and the newest

# Copies that the ordinary rows take while one layer is computed.
_ORDINARY_OUTPUTS = 1.25
_ORDINARY_WIDTHS = 9.0
_ORDINARY_SCORES = 1.15
_ORDINARY_SCORES_CPU = 8.0  # whose softmax is made of basic operations


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak of a step, by what takes them.

    Attributes:
        weights_bytes: the base model, in all processes.
        trainable_bytes: the adapter's weights and gradients, in all processes and between them.
        optimizer_bytes: AdamW's moments.
        ordinary_bytes: keys, values and hidden states of the longest sequence; where computing
            them takes more than the mask rows do later, that too.
        activation_bytes: what the mask rows of a forward keep for the gradient.
        logits_bytes: logits of these rows, in all forms that exist at once.
        available_bytes: what the device can give.
    """

    weights_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    ordinary_bytes: int
    activation_bytes: int
    logits_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that is needed at once."""
        return sum(size for _, size in self._parts())

    def lines(self) -> list[str]:
        """Say it, a line for each part and one for the sum."""
        rows = [*self._parts(), ("together", self.total_bytes), ("available", self.available_bytes)]
        return [f"{name:<34}{size / 1e9:8.2f} GB" for name, size in rows]

    def check(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            ValueError: it does not; the message names the option that helps most.
        """
        if self.total_bytes <= self.available_bytes:
            return
        name, size = max(self._parts(), key=lambda part: part[1])
        raise ValueError(
            f"training needs about {self.total_bytes / 1e9:.1f} GB of memory, "
            f"{self.available_bytes / 1e9:.1f} GB are available; the most, {size / 1e9:.1f} GB, "
            f"goes to the {name}: {_ADVICE[name]}"
        )

    def _parts(self) -> list[tuple[str, int]]:
        sizes = (
            self.weights_bytes,
            self.trainable_bytes,
            self.optimizer_bytes,
            self.ordinary_bytes,
            self.activation_bytes,
            self.logits_bytes,
        )
        return list(zip(_ADVICE, sizes, strict=True))


_ADVICE = {
    "weights of the model": "take a smaller model or one of fewer bits",
    "adapter and its gradients": "lower --rank or adapt fewer layers (--target-modules)",
    "optimiser": "lower --rank or adapt fewer layers (--target-modules)",
    "tokens of the longest sequence": "lower --max-seq-length",
    "mask rows": "lower --rows-per-forward or turn on --grad-checkpoint",
    "logits of the mask rows": "lower --rows-per-forward",
}


@dataclass(frozen=True)
class _Shape:
    """What of a model decides the size of a step.

    Attributes:
        outputs: numbers that all linear layers put out for a row, by layer.
        width: D.
        heads: of attention.
        keys: numbers in the keys and values of a row, by layer.
        vocab: V.
        item_bytes: bytes of a number in a hidden state.
    """

    outputs: list[int]
    width: int
    heads: int
    keys: list[int]
    vocab: int
    item_bytes: int


def estimate(model: MTPModel, settings: TrainSettings, *, longest: int) -> MemoryEstimate:
    """Estimate the memory that training takes.

    Against MLX's peak of a step in one process, the estimate was from 13% below (a model with more
    normalisations than others) to 16% above for the shapes that it was fitted to, and about 15%
    above, weights included, for the default model with 64 or 128 mask rows behind 512 or 1024
    tokens.

    Args:
        model: with the adapter that is to be trained; nothing else of it may be trainable.
        settings: of the run.
        longest: tokens of the longest sequence.
    """
    shape, count = _shape(model), worker_count(settings.workers, batch_size=settings.batch_size)
    trainable = _bytes(model.trainable_parameters())
    wide = _WIDE * sum(value.size for value in _arrays(model.trainable_parameters()))
    rows = min(settings.rows_per_forward, settings.num_anchors * settings.num_draft_tokens)
    rows = max(rows, settings.num_draft_tokens)
    kept = rows if settings.gate else rows + longest  # without the gate all rows have a gradient
    activation = _activation_bytes(shape, kept, longest, checkpoint=settings.grad_checkpoint)
    logits = _logits_bytes(shape, rows, settings, sampler=model.sampler_head is not None)
    held = longest * (sum(shape.keys) + shape.width) * shape.item_bytes
    ordinary = max(held, held + _prefill_bytes(shape, longest) - activation - logits)
    return MemoryEstimate(
        weights_bytes=count * (_bytes(model.parameters()) - trainable),
        trainable_bytes=_adapter_bytes(wide, narrow=trainable, count=count),
        optimizer_bytes=2 * wide,  # the first process alone has one
        ordinary_bytes=count * ordinary,
        activation_bytes=count * activation,
        logits_bytes=count * logits,
        available_bytes=available_bytes(),
    )


def available_bytes() -> int:
    """What the default device can give to a program, bytes."""
    if mx.default_device().type == mx.gpu:
        info: dict[str, Any] = mx.device_info()
        for key in ("max_recommended_working_set_size", "free_memory", "total_memory"):
            if key in info:
                return int(info[key])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may get less than the machine has
        machine = min(machine, int(_CGROUP_LIMIT.read_text()))
    return int(MEMORY_SHARE * machine)


def _adapter_bytes(wide: int, *, narrow: int, count: int) -> int:
    """The adapter in ``count`` processes, of ``wide`` bytes in float32.

    Where the model computes in another type, ``narrow`` bytes of that are beside it.
    """
    own = (1 + _GRADIENTS) * wide + (narrow if narrow != wide else 0)
    shared = (2 * count - 1) * wide if count > 1 else 0  # sent, received, and the copies of these
    return round(count * own + shared)


def _activation_bytes(shape: _Shape, rows: int, held: int, *, checkpoint: bool) -> int:
    """What mask rows behind ``held`` tokens keep for their gradient."""
    layers = [
        rows * (_LAYER_OUTPUTS * outputs + _LAYER_WIDTHS * shape.width)
        + (held + rows) * (_SCORES * shape.heads * rows + _KEYS * keys)
        for outputs, keys in zip(shape.outputs, shape.keys, strict=True)
    ]
    kept = max(layers) + len(layers) * rows * shape.width if checkpoint else sum(layers)
    return round(kept * shape.item_bytes)


def _logits_bytes(shape: _Shape, rows: int, settings: TrainSettings, *, sampler: bool) -> int:
    size, is_dist = rows * shape.vocab, settings.teacher == "dist"
    if 0 < settings.candidates < shape.vocab:
        return round((_CHOOSING * size + _CANDIDATES * rows * settings.candidates) * _WIDE)
    if mx.default_device().type == mx.cpu:
        copies = _LOGITS_CPU + _LOGITS_OF_HEAD_CPU * (1 + sampler) + _LOGITS_OF_DIST_CPU * is_dist
        return round((copies * size + _PIECE_CPU * min(size, PIECE)) * _WIDE)
    return round((_LOGITS + _LOGITS_OF_HEAD * (1 + sampler + is_dist)) * size * _WIDE)


def _prefill_bytes(shape: _Shape, length: int) -> int:
    """What computing the ordinary rows of a sequence takes, beyond what stays of them."""
    row = _ORDINARY_OUTPUTS * max(shape.outputs) + _ORDINARY_WIDTHS * shape.width
    on_cpu = mx.default_device().type == mx.cpu
    scores = (_ORDINARY_SCORES_CPU if on_cpu else _ORDINARY_SCORES) * shape.heads * length
    return round(length * (row + scores) * shape.item_bytes)


def _shape(model: MTPModel) -> _Shape:
    row = ordinary_rows(model, mx.array([0]))  # never evaluated: its shapes are enough
    keys = [sum(part.shape[1] * part.shape[-1] for part in pair) for pair in row.keys_and_values]
    args: Any = model.base.args
    active = getattr(args, "num_experts_per_tok", 1) or 1
    return _Shape(
        outputs=[_outputs(layer, active) for layer in model.base.layers],
        width=model.hidden_size,
        heads=args.num_attention_heads,
        keys=keys,
        vocab=model.vocab_size,
        item_bytes=row.hidden.dtype.size,
    )


def _outputs(layer: nn.Module, active_experts: int) -> int:
    """Numbers that the linear layers of a layer put out for a row."""
    total = 0
    for _, module in layer.named_modules():
        weight = module.get("weight")
        if isinstance(weight, mx.array) and weight.ndim >= 2:
            total += weight.shape[-2] * (active_experts if weight.ndim == 3 else 1)
    return total


def _bytes(parameters: Any) -> int:
    return sum(value.nbytes for value in _arrays(parameters))


def _arrays(parameters: Any) -> list[mx.array]:
    return [value for _, value in cast(list[tuple[str, mx.array]], tree_flatten(parameters))]
