"""Memory that a training run needs, estimated from the sizes of its tensors.

With r mask rows per forward, n tokens of the longest sequence, width D, V ids, P adapter weights
and, per layer, o outputs of its linear layers, k numbers of a row's keys and values and h heads:

    adapter            3 P          weights, summed gradients and newest gradients
    optimiser          2 P or 3 P   AdamW's moments, and the average of the weights if there is one
    sequence           n (D + all k)
    mask rows          sum over layers of  2.6 r o + r D + (n + r) (1.25 h r + k)
    logits             r V (4 + 1.6 per head + 4 for the teacher "dist"), and on a CPU three copies
                       of the piece that ``fast_math`` computes at once; or 4 r (V + candidates)

Weights of the adapter, moments and logits are float32; the rest has the model's type.  Computing
the sequence itself needs n (1.25 o + 9 D + 8 h n) for one layer on a CPU, where attention is not
fused (h n on a GPU); that counts if it is more than mask rows and logits, which come later.

Heads keep no activations of the model's layers: in place of the mask rows they have k layers over
s rows, k (s (2.6 o + D) + 1.25 h s^2), with s = n, or for an MLP as many as there are anchors.

The factors of copies were fitted to MLX's peaks on a CPU in float32, for models of width 128 with 2
or 6 layers; they were never compared with a GPU.  The program itself is not included: on Linux a
process took 0.45 GB more than MLX counted.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.backends.cpu.fast_math import PIECE
from mlx_mtp.evaluation.forward import ordinary_rows
from mlx_mtp.model.draft_heads import DraftHeads
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.workers import worker_count
from mlx_mtp.train.settings import TORCH, TrainSettings

MEMORY_SHARE = 0.9  # of a machine's memory; the rest is left to the system
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_ADVICE = {
    "weights of the model": "use a smaller model, or one quantised to fewer bits",
    "adapter and its gradients": "make it smaller (--rank, --target-modules, --num-draft-tokens)",
    "optimiser": "make the adapter smaller (--rank, --target-modules, --num-draft-tokens)",
    "tokens of the longest sequence": "lower --max-seq-length",
    "mask rows": "lower --rows-per-forward or use --grad-checkpoint",
    "logits of the mask rows": "lower --rows-per-forward",
}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, by use, in all processes together.

    Attributes:
        weights_bytes: the base model.
        trainable_bytes: weights and gradients of the adapter, with copies shared by processes.
        optimizer_bytes: AdamW's moments and the average of the weights.
        ordinary_bytes: the longest sequence.
        activation_bytes: activations of the mask rows that the gradient needs.
        logits_bytes: logits of the mask rows.
        available_bytes: memory of the device.
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
        """Sum of all uses."""
        return sum(size for _, size in self._parts())

    def lines(self) -> list[str]:
        """One line for each use, the sum and the available memory."""
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
            f"training needs about {self.total_bytes / 1e9:.1f} GB of memory, but "
            f"{self.available_bytes / 1e9:.1f} GB are available; {size / 1e9:.1f} GB are for the "
            f"{name}: {_ADVICE[name]}"
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


def estimate(model: MTPModel, settings: TrainSettings, *, longest: int) -> MemoryEstimate:
    """Estimate the memory of training; see the module docstring for the formula.

    Args:
        model: with the adapter; nothing else of it may be trainable.
        settings: of the run.
        longest: number of tokens of the longest sequence.
    """
    args: Any = model.base.args
    on_cpu = mx.default_device().type == mx.cpu
    row = ordinary_rows(model, mx.array([0]))  # never evaluated: only its shapes are used
    item, width, heads = row.hidden.dtype.size, model.hidden_size, _num_heads(args)
    keys = row.num_values
    experts = getattr(args, "num_experts_per_tok", 1) or 1
    outputs = [_num_outputs(layer, experts) for layer in model.base.layers]

    narrow = _num_bytes(model.trainable_parameters())
    wide = 4 * sum(value.size for value in _arrays(model.trainable_parameters()))
    count = worker_count(settings.workers, batch_size=settings.batch_size)
    copies = 3 * count + (2 * count - 1 if count > 1 else 0)  # sent, received, copied by each
    trainable = copies * wide + count * (narrow if narrow != wide else 0)

    k = settings.num_draft_tokens
    rows = max(min(settings.rows_per_forward, settings.num_anchors * k), k)
    kept = rows if settings.gate else rows + longest  # without the gate all rows have a gradient
    layers = [
        kept * (2.6 * output + width) + (longest + kept) * (1.25 * heads * kept + key)
        for output, key in zip_longest(outputs, keys, fillvalue=0)  # some layers share their keys
    ]
    if model.heads is not None:
        layers = [_head_values(model.heads, longest=longest, num_anchors=-(-rows // k))] * k
    if settings.grad_checkpoint:
        layers = [max(layers), len(layers) * kept * width]
    activations = item * sum(layers)

    num_logits, num_heads = rows * model.vocab_size, 1 + (model.sampler_head is not None)
    logits = 4 * num_logits * (4 + 1.6 * num_heads + 4 * (settings.teacher == "dist"))
    logits += 4 * 3 * min(num_logits, PIECE) if on_cpu else 0
    if 0 < settings.candidates < model.vocab_size:
        logits = 4 * rows * 4 * (model.vocab_size + settings.candidates)

    models = 2 if settings.backend == TORCH else 1  # PyTorch has its own copy, at most as wide
    sequence = item * longest * (sum(keys) + width)
    scores = (8 if on_cpu else 1) * heads * longest
    prefill = item * longest * (1.25 * max(outputs) + 9 * width + scores)
    return MemoryEstimate(
        weights_bytes=models * count * (_num_bytes(model.parameters()) - narrow),
        trainable_bytes=trainable,
        optimizer_bytes=(3 if settings.ema else 2) * wide,  # only the first process has one
        ordinary_bytes=count * round(sequence + max(0, prefill - activations - logits)),
        activation_bytes=count * round(activations),
        logits_bytes=count * round(logits),
        available_bytes=available_bytes(),
    )


def available_bytes() -> int:
    """Memory that the default device can give to a program, bytes."""
    if mx.default_device().type == mx.gpu:
        info: dict[str, Any] = mx.device_info()
        for key in ("max_recommended_working_set_size", "free_memory", "total_memory"):
            if key in info:
                return int(info[key])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may get less than the machine has
        machine = min(machine, int(_CGROUP_LIMIT.read_text()))
    return int(MEMORY_SHARE * machine)


def _head_values(heads: DraftHeads, *, longest: int, num_anchors: int) -> float:
    """Values that the gradient of one head needs."""
    width = heads.config.base_hidden_size
    if not heads.remembers:
        return num_anchors * 3.6 * width
    scores = 1.25 * heads.config.num_attention_heads * longest
    return longest * (2.6 * _num_outputs(heads.layers[0], 1) + width + scores)


def _num_heads(args: Any) -> int:
    """Number of heads of a layer, by whatever name mlx-lm's class has it."""
    for name in ("num_attention_heads", "n_heads", "n_head", "num_heads", "num_query_heads"):
        count = getattr(args, name, None)
        if count:
            return max(count) if isinstance(count, list) else count
    return 1


def _num_outputs(layer: nn.Module, experts: int) -> int:
    """Outputs per row of all linear layers of a layer, with ``experts`` active experts."""
    weights = (module.get("weight") for _, module in layer.named_modules())
    return sum(
        weight.shape[-2] * (experts if weight.ndim == 3 else 1)
        for weight in weights
        if isinstance(weight, mx.array) and weight.ndim >= 2
    )


def _num_bytes(parameters: Any) -> int:
    return sum(value.nbytes for value in _arrays(parameters))


def _arrays(parameters: Any) -> list[mx.array]:
    return [value for _, value in cast(list[tuple[str, mx.array]], tree_flatten(parameters))]
