"""Whether our training step and PyTorch's compute the same; see ``lab.train_step``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import trainable
from mlx_mtp.train.gradient.step import Parameters, StepGradient
from mlx_mtp.train.settings import TrainSettings

if TYPE_CHECKING:
    from mlx_mtp.lab.torch_step import TorchStep

MAX_LOSS_ERROR = 1e-3
MAX_NORM_ERROR = 1e-2
MAX_GRADIENT_ERROR = 0.1  # two near-equal logits may give a row another target
_NOISE = 0.01
_KINDS = ("lora_a", "lora_b", "mask_embeddings", "sampler_head")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Relative differences between the two sides.

    Attributes:
        losses: for each term of the loss, and for their sum.
        norms: for the gradient's norm by kind of parameter, and for the whole norm.
        gradient: norm of the difference of the gradients over the norm of ours.
    """

    losses: dict[str, float]
    norms: dict[str, float]
    gradient: float

    def check(self) -> None:
        """Check that the differences are small.

        Raises:
            ValueError: one is too large.
        """
        bounds = {
            "loss": (self.losses, MAX_LOSS_ERROR),
            "gradient norm": (self.norms, MAX_NORM_ERROR),
            "gradient": ({"": self.gradient}, MAX_GRADIENT_ERROR),
        }
        for kind, (errors, maximum) in bounds.items():
            for name, error in errors.items():
                if not error <= maximum:
                    raise ValueError(
                        f"PyTorch's step is not ours: {f'{kind} {name}'.strip()} differs by "
                        f"{error:.2g}, over {maximum}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values with two digits."""
        groups = {"losses": self.losses, "norms": self.norms}
        return {
            key: {name: _short(value) for name, value in values.items()}
            for key, values in groups.items()
        } | {"gradient": _short(self.gradient)}


def perturbed(parameters: Parameters, *, seed: int = 0) -> Parameters:
    """The parameters with noise, so that no part of the gradient is zero."""
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    return {
        name: value + _NOISE * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(parameters.items(), keys, strict=True)
    }


def compare(
    model: MTPModel,
    theirs: TorchStep,
    settings: TrainSettings,
    data: Sequence[TokenSequence],
    *,
    max_rows: int | None = None,
) -> Agreement:
    """Compare the gradients of one step on both sides; restores the parameters of both."""
    exact = dataclasses.replace(settings, candidates=0)
    before = trainable(model)
    parameters, chosen = perturbed(before), range(len(data))
    gradient = StepGradient(model, exact)
    ours = gradient(parameters, data, chosen, step=0)
    gradient.load(before)
    theirs.load(parameters)
    terms = theirs.gradient(data, chosen, step=0, max_rows=max_rows)
    their_gradients = theirs.gradients()
    theirs.load(before)
    weights = settings.loss_weights
    total = sum(value * getattr(weights, name) for name, value in terms.items())
    losses = {name: _relative_difference(ours.terms[name], value) for name, value in terms.items()}
    mine = {name: np.array(value) for name, value in ours.gradients.items()}
    norms = {"all": _relative_difference(_norm(mine), _norm(their_gradients))}
    for kind in _KINDS:
        left, right = (
            {name: value for name, value in side.items() if kind in name}
            for side in (mine, their_gradients)
        )
        if left:
            norms[kind] = _relative_difference(_norm(left), _norm(right))
    difference = _norm({name: value - their_gradients[name] for name, value in mine.items()})
    return Agreement(
        losses={"all": _relative_difference(ours.loss, total), **losses},
        norms=norms,
        gradient=difference / _norm(mine),
    )


def _norm(gradients: dict[str, np.ndarray]) -> float:
    squares = (float(np.square(value, dtype=np.float64).sum()) for value in gradients.values())
    return math.sqrt(sum(squares))


def _short(value: float) -> float:
    return float(f"{value:.2g}")


def _relative_difference(left: float, right: float) -> float:
    return abs(left - right) / max(abs(left), abs(right), 1e-12)
