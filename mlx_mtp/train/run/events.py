"""Events of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.train.run.checkpoint import RAW


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
class Planned:
    """The number of steps was fitted to the time left.

    Attributes:
        step: training steps so far.
        iters: training steps of the whole run.
        left_s: seconds until the end.
    """

    step: int
    iters: int
    left_s: float


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
        evaluation: the result of the better weights.
        next_token_loss: cross-entropy of the ordinary rows, nats per token.
        is_best: whether it has more tokens per step than all earlier ones.
        weights: the better weights, ``raw`` or ``ema``.
        results: of all weights that were evaluated, by name.
    """

    step: int
    evaluation: Evaluation
    next_token_loss: float
    is_best: bool
    weights: str = RAW
    results: Mapping[str, Evaluation] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a line of the history: the better evaluation, and the others by name."""
        return {
            "step": self.step,
            **self.evaluation.to_dict(),
            "next_token_loss": self.next_token_loss,
            "is_best": self.is_best,
            "weights": self.weights,
            "results": {name: result.to_dict() for name, result in self.results.items()},
        }


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


Event = Noticed | Planned | Stepped | Reported | Evaluated | Saved
