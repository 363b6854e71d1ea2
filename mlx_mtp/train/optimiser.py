"""The optimiser of a run: clipped gradients, AdamW, learning rates, and averaged weights.

AdamW is MLX's with bias correction, which MLX leaves out by default; without it the first steps are
several times as long as the learning rate says.  Weights are decayed as usual (Loshchilov and
Hutter 2019, arXiv 1711.05101): matrices are, norms, biases and embeddings of masks are not.
``lora_b`` may have a higher rate than the rest (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

The exponential moving average (EMA) of the weights drafts better than the newest weights while the
learning rate is high.  After update t, counted from 0,

    average += (1 - d) (weights - average),   d = min(ema, (1 + t) / (10 + t)),

so that a short run is not dominated by the weights from which it began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS
from mlx_mtp.train.pace import Pace
from mlx_mtp.train.run.checkpoint import EMA, OPTIMISER, RAW, WEIGHTS, under
from mlx_mtp.train.settings import TrainSettings

Parameters = dict[str, mx.array]
Schedule = Callable[[mx.array], mx.array]

_UPDATES = "ema_updates"  # name of a tensor of a state
_LORA_B = "lora_b"
_NOT_DECAYED = (MASK_EMBEDDINGS, "bias")  # matrices too: one row per mask or head


class Optimiser:
    """The weights of an adapter during training, and what changes them.

    Args:
        settings: of the run.
        parameters: from ``adapter.trainable``, float32.

    Attributes:
        parameters: the newest weights by name.
        average: their moving average, if ``settings.ema`` is above 0.
        pace: progress of the schedule; may be replaced between updates.
    """

    def __init__(self, settings: TrainSettings, parameters: Mapping[str, mx.array]) -> None:
        self.parameters: Parameters = dict(parameters)
        self.average: Parameters | None = dict(parameters) if settings.ema else None
        self._settings = settings
        self._updates = 0  # of the average
        self.pace = Pace.of(settings.iters, warmup=settings.warmup)
        self._groups: list[tuple[list[str], optim.AdamW]] = []
        groups: dict[tuple[float, float], list[str]] = {}
        for name, value in self.parameters.items():
            rate = settings.lora_b_rate if _leaf(name) == _LORA_B else 1.0
            decay = settings.weight_decay if is_decayed(name, value) else 0.0
            groups.setdefault((rate, decay), []).append(name)
        for (rate, decay), names in groups.items():
            adamw = optim.AdamW(
                learning_rate=lambda step, rate=rate: rate * self._rate(step),
                weight_decay=decay,
                bias_correction=True,
            )
            adamw.init(_some(self.parameters, names))
            self._groups.append((names, adamw))

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last update; that of ``lora_b`` is ``lora_b_rate`` times as high."""
        step = self._groups[0][1].step
        return float(np.array(self._rate(mx.maximum(step, 1) - 1)))

    def _rate(self, step: mx.array) -> mx.array:
        return schedule(self._settings, self.pace)(step)

    def versions(self) -> dict[str, Parameters]:
        """The newest weights (``raw``) and, once they differ, the averaged ones (``ema``)."""
        versions = {RAW: self.parameters}
        if self.average is not None and self._updates:
            versions[EMA] = self.average
        return versions

    def clip(self, gradients: Parameters) -> tuple[Parameters, float]:
        """Scale gradients down to the maximum norm, and return their norm before."""
        clipped, norm = optim.clip_grad_norm(gradients, self._settings.clip or math.inf)
        return clipped, float(np.array(norm))

    def update(self, gradients: Parameters) -> None:
        """Do one step with clipped gradients of all parameters."""
        updated: Parameters = {}
        for names, adamw in self._groups:
            updated |= adamw.apply_gradients(_some(gradients, names), _some(self.parameters, names))
        self.parameters = _some(updated, self.parameters)
        if self.average is not None:
            weight = 1 - ema_decay(self._settings.ema, self._updates)
            self.average = {
                name: value + weight * (self.parameters[name] - value)
                for name, value in self.average.items()
            }
            self._updates += 1
        mx.eval(self.parameters, self.average, [adamw.state for _, adamw in self._groups])

    def tensors(self) -> Parameters:
        """Everything that a state needs, by name."""
        tensors = {WEIGHTS[RAW] + name: value for name, value in self.parameters.items()}
        for names, adamw in self._groups:
            tensors[f"{OPTIMISER}step"] = adamw.step  # the same in all groups
            for name in names:
                moments = adamw.state[name]
                tensors |= {f"{OPTIMISER}{name}.{key}": moments[key] for key in moments}
        if self.average is not None:
            tensors |= {WEIGHTS[EMA] + name: value for name, value in self.average.items()}
            tensors[_UPDATES] = mx.array(self._updates)
        return tensors

    def restore(self, tensors: Mapping[str, mx.array]) -> None:
        """Load the result of ``tensors``.

        A state from before there was an average has none: it begins at the weights of that state.
        """
        self.parameters = under(WEIGHTS[RAW], tensors)
        state = under(OPTIMISER, tensors)
        for names, adamw in self._groups:
            moments = {name: {key: state[f"{name}.{key}"] for key in ("m", "v")} for name in names}
            rate = adamw.learning_rate  # set again from the schedule by the next update
            adamw.state = {"step": state["step"], "learning_rate": rate, **moments}
        if self.average is not None:
            self.average = under(WEIGHTS[EMA], tensors) or dict(self.parameters)
            self._updates = int(np.array(tensors[_UPDATES])) if _UPDATES in tensors else 0


def is_decayed(name: str, value: mx.array) -> bool:
    """Whether a parameter has weight decay: matrices, but no biases and no embeddings of masks."""
    return value.ndim > 1 and _leaf(name) not in _NOT_DECAYED


def ema_decay(maximum: float, updates: int) -> float:
    """Factor of the average in its next update, after a number of earlier ones."""
    return min(maximum, (1 + updates) / (10 + updates))


def schedule(settings: TrainSettings, pace: Pace | None = None) -> Schedule:
    """Learning rate by step: a linear warm-up, then a cosine decay by the progress of the run.

    Args:
        settings: of the run.
        pace: its progress by step; by default that of ``settings.iters`` steps.
    """
    pace = pace or Pace.of(settings.iters, warmup=settings.warmup)
    peak, warmup = settings.learning_rate, pace.warmup
    end = peak * settings.min_learning_rate

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        part = mx.clip((step - pace.start) / max(1, pace.iters - pace.start), 0, 1)
        progress = pace.begun + (1 - pace.begun) * part
        decayed = end + (peak - end) * 0.5 * (1 + mx.cos(math.pi * progress))
        return mx.where(step < warmup, peak * (step + 1) / (warmup + 1), decayed)

    return rate


def _leaf(name: str) -> str:
    return name.rpartition(".")[-1]


def _some(tensors: Mapping[str, mx.array], names: Iterable[str]) -> Parameters:
    return {name: tensors[name] for name in names}
