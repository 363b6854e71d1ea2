"""Events of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.evaluation.acceptance import Evaluation


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A training step was completed.

    Attributes:
        step: training steps so far, those before a resume included.
        iters: training steps of the whole run.
        seconds: duration of the step.
    """

    step: int
    iters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Means over the steps since the last report.

    Attributes:
        step: training steps so far.
        loss: all terms, weighted.
        terms: each term by name, unweighted.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        tokens_per_s: tokens of the sequences, ordinary rows, per second.
        rows_per_s: mask rows per second.
        peak_memory_bytes: peak so far, of MLX on a GPU and of the process on a CPU.
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
    """Held-out sequences were evaluated.

    Attributes:
        step: training steps so far.
        evaluation: the result.
        next_token_loss: cross-entropy of the ordinary rows, nats per token.
        is_best: whether it has more tokens per step than all earlier ones.
    """

    step: int
    evaluation: Evaluation
    next_token_loss: float
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Noticed:
    """A line for the user.

    Attributes:
        step: training steps so far.
        text: the line.
    """

    step: int
    text: str


Event = Noticed | Stepped | Reported | Evaluated | Saved
