"""What decides a training run, as data: it is saved beside the adapter, and resuming reads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mtp.train.gradient.losses import TEACHERS, LossWeights

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All that the loop is told.

    Attributes:
        num_draft_tokens: k, mask tokens of a block.
        rank: rank of the gated LoRA weights.
        scale: factor of the low-rank product.
        target_modules: leaf names of the adapted linear layers; those that the model has count.
        sampler: whether there is a sampler head.
        iters: optimiser steps.
        batch_size: sequences of a step.
        learning_rate: its peak, after the warm-up.
        warmup: steps in which it rises from 0.
        min_learning_rate: share of the peak that the cosine ends in.
        weight_decay: AdamW's.
        clip: largest norm of a step's gradient; 0 does not clip.
        num_anchors: mask blocks of a sequence.
        drop_late: chance that a block ends before each mask but its first; 0 keeps them all.
        teacher: what the mask rows learn, see ``losses.make_targets``.
        base_weight, sampler_weight, lcm_weight: how much each term of the loss counts.
        candidates: tokens that a loss is taken over, the likeliest of a forward's rows; 0 takes the
            whole vocabulary.
        max_seq_length: most ids of a sequence.
        rows_per_forward: most mask rows that are computed at once.
        workers: processes that train; 0 is one a core on a Linux CPU, else one.
        grad_checkpoint: whether layers are computed again for the gradient, to save memory.
        gate: False trains ordinary LoRA on all rows, for the ablation alone.
        steps_per_report, steps_per_eval, save_every: after how many steps each happens.
        val_batches: held-out sequences of an evaluation; -1 takes all.
        seed: decides all random draws.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    num_draft_tokens: int = 8
    rank: int = 32
    scale: float = 2.0
    target_modules: tuple[str, ...] = PROJECTIONS
    sampler: bool = True
    iters: int = 1000
    batch_size: int = 4
    learning_rate: float = 5e-4
    warmup: int = 50
    min_learning_rate: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    num_anchors: int = 32
    drop_late: float = 0.0
    teacher: str = "argmax"
    base_weight: float = 1.0
    sampler_weight: float = 1.0
    lcm_weight: float = 1.0
    candidates: int = 0
    max_seq_length: int = 2048
    rows_per_forward: int = 128
    workers: int = 0
    grad_checkpoint: bool = False
    gate: bool = True
    steps_per_report: int = 10
    steps_per_eval: int = 100
    save_every: int = 100
    val_batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _AMOUNTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0")
        if self.drop_late >= 1:
            raise ValueError(f"drop_late must be below 1, got {self.drop_late}")
        if self.teacher not in TEACHERS:
            raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {self.teacher!r}")
        if not self.target_modules:
            raise ValueError("target_modules must name at least one layer")
        if not (self.base_weight or self.sampler_weight or self.lcm_weight):
            raise ValueError("the loss has no term: all of its weights are 0")
        if self.grad_checkpoint and not self.gate:  # ordinary rows would get no gradient
            raise ValueError("grad_checkpoint does not go together with an adapter without a gate")
        if self.val_batches < 1 and self.val_batches != -1:
            raise ValueError(f"val_batches must be at least 1, or -1, got {self.val_batches}")

    @property
    def loss_weights(self) -> LossWeights:
        """How much each term of the loss counts."""
        return LossWeights(self.base_weight, self.sampler_weight, self.lcm_weight)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Build settings from what ``to_dict`` gave.

        Raises:
            ValueError: a key is unknown or a value is out of range.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        given = dict(values)
        if "target_modules" in given:
            given["target_modules"] = tuple(given["target_modules"])
        return cls(**given)


_COUNTS = (
    "num_draft_tokens",
    "rank",
    "iters",
    "batch_size",
    "num_anchors",
    "max_seq_length",
    "rows_per_forward",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
)
_AMOUNTS = (
    "learning_rate",
    "warmup",
    "min_learning_rate",
    "weight_decay",
    "clip",
    "drop_late",
    "base_weight",
    "sampler_weight",
    "lcm_weight",
    "candidates",
    "workers",
    "seed",
)
