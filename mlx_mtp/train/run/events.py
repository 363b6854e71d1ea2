"""What a training run tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.evaluation.acceptance import Evaluation


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A step was done.

    Attributes:
        step: optimiser steps done so far, of this run and those that it resumes.
        iters: steps wanted.
        seconds: what the step took.
    """

    step: int
    iters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Means over the steps since the last report.

    Attributes:
        step: optimiser steps done.
        loss: all terms, weighted.
        terms: each term by name, unweighted.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        tokens_per_s: tokens of the sequences, ordinary rows, per second.
        rows_per_s: mask rows per second.
        peak_memory_bytes: highest use so far, where MLX counts it; else of the process.
    """

    step: int
    loss: float
    terms: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    rows_per_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Held-out sequences were measured.

    Attributes:
        step: optimiser steps done.
        evaluation: what came out.
        next_token_loss: cross-entropy of the ordinary rows, nats per token.
        is_best: whether no earlier evaluation gave more tokens per step.
    """

    step: int
    evaluation: Evaluation
    next_token_loss: float
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint to resume from was written."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Noticed:
    """Something that the user should know, in a line.

    Attributes:
        step: optimiser steps done.
        text: the line.
    """

    step: int
    text: str


Event = Noticed | Stepped | Reported | Evaluated | Saved
