"""Whether our training step and PyTorch's are the same one, see ``bench.train_step``."""

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
_SHAKE = 0.01
_KINDS = ("lora_a", "lora_b", "mask_embeddings", "sampler_head")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the two sides are apart; all relative.

    Attributes:
        losses: of each term of the loss, and of all together.
        norms: of the gradient's norm by kind of parameter, and of all together.
        gradient: norm of the difference of the gradients.
    """

    losses: dict[str, float]
    norms: dict[str, float]
    gradient: float

    def check(self) -> None:
        """Refuse to go on with sides that do different things.

        Raises:
            ValueError: they do; the message says in what.
        """
        bounds = [(f"loss {name}", each, MAX_LOSS_ERROR) for name, each in self.losses.items()]
        bounds += [
            (f"gradient norm {name}", each, MAX_NORM_ERROR) for name, each in self.norms.items()
        ]
        bounds.append(("gradient", self.gradient, MAX_GRADIENT_ERROR))
        for what, found, most in bounds:
            if not found <= most:
                raise ValueError(
                    f"PyTorch's step is not ours: {what} is {found:.2g} apart, over {most}"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of two digits."""

        def short(values: dict[str, float]) -> dict[str, float]:
            return {name: float(f"{value:.2g}") for name, value in values.items()}

        return {
            "losses": short(self.losses),
            "norms": short(self.norms),
            **short({"gradient": self.gradient}),
        }


def shaken(parameters: Parameters, *, seed: int = 0) -> Parameters:
    """The parameters with noise on them, so that no part of the gradient is zero."""
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    return {
        name: value + _SHAKE * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(parameters.items(), keys, strict=True)
    }


def compare(
    model: MTPModel,
    rival: TorchStep,
    settings: TrainSettings,
    data: Sequence[TokenSequence],
    *,
    most_rows: int | None = None,
) -> Agreement:
    """Compute the gradient of one step on both sides; the parameters of both are kept."""
    exact = dataclasses.replace(settings, candidates=0)
    before = trainable(model)
    parameters, chosen = shaken(before), range(len(data))
    gradient = StepGradient(model, exact)
    ours = gradient(parameters, data, chosen, step=0)
    gradient.load(before)
    rival.load(parameters)
    terms = rival.gradient(data, chosen, step=0, most_rows=most_rows)
    theirs = rival.gradients()
    rival.load(before)
    weights = settings.loss_weights
    total = sum(value * getattr(weights, name) for name, value in terms.items())
    losses = {name: _apart(ours.terms[name], value) for name, value in terms.items()}
    mine = {name: np.array(value) for name, value in ours.gradients.items()}
    norms = {"all": _apart(_norm(mine), _norm(theirs))}
    for kind in _KINDS:
        left, right = (
            {name: each for name, each in side.items() if kind in name} for side in (mine, theirs)
        )
        if left:
            norms[kind] = _apart(_norm(left), _norm(right))
    difference = _norm({name: value - theirs[name] for name, value in mine.items()})
    return Agreement(
        losses={"all": _apart(ours.loss, total), **losses},
        norms=norms,
        gradient=difference / _norm(mine),
    )


def _norm(gradients: dict[str, np.ndarray]) -> float:
    squares = (float(np.square(each, dtype=np.float64).sum()) for each in gradients.values())
    return math.sqrt(sum(squares))


def _apart(left: float, right: float) -> float:
    return abs(left - right) / max(abs(left), abs(right), 1e-12)
