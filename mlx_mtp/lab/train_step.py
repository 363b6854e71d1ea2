"""Gradients of a training step by MLX and by PyTorch: ``python -m mlx_mtp.lab.train_step``.

Both back-ends compute the gradient of the same sequences, blocks and parameters, in one process
each: MLX in the model's type, PyTorch in the type that is fastest on its device.  Before the clock
starts they must agree as far as that type allows; that they compute the same in float32 is for the
tests.  Noise is added to the parameters, because half of a new adapter's gradient is zero.

Steps are then timed in pairs of alternating order.  CPU seconds count all threads, and are what to
compare on a machine that has other work; on a GPU they say little.  Above 1, a ratio is in favour
of PyTorch.  ``OMP_NUM_THREADS`` limits both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import mlx.core as mx
import numpy as np

from mlx_mtp.bench.machine_state import threads
from mlx_mtp.cli.options import AS_JSON, MODEL, field_option, option
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.terminal import Status
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.backend import make_gradient
from mlx_mtp.train.gradient.step import Parameters, StepGradient, StepResult
from mlx_mtp.train.settings import MLX, TORCH, TrainSettings

MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 0.03, 0.3  # in bfloat16
_NOISE = 0.01


def sample_sequences(tokenizer: Any, *, count: int, length: int) -> list[TokenSequence]:
    """Cut sequences from the built-in prompts; all but their first quarter is answer.

    Args:
        tokenizer: from ``load``.
        count: number of sequences.
        length: number of ids per sequence.
    """
    text = "\n\n".join(prompt.text for prompt in builtin_prompts())
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    ids *= -(-count * length // len(ids))
    answer = [position >= length // 4 for position in range(length)]
    starts = range(0, count * length, length)
    return [TokenSequence(ids[start : start + length], answer) for start in starts]


def perturbed(parameters: Parameters, *, seed: int = 0) -> Parameters:
    """The parameters with noise, so that no part of the gradient is zero."""
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    return {
        name: value + _NOISE * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(parameters.items(), keys, strict=True)
    }


def differences(mlx: StepResult, torch: StepResult) -> dict[str, float]:
    """Relative differences of the loss and of the whole gradient.

    Raises:
        ValueError: one is too large for two back-ends that compute the same.
    """
    pairs = [(np.array(value), np.array(torch.gradients[k])) for k, value in mlx.gradients.items()]
    apart = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
    whole = sum(float(np.square(a, dtype=np.float64).sum()) for a, _ in pairs)
    found = {
        "loss": abs(mlx.loss - torch.loss) / abs(mlx.loss),
        "gradient": (apart / whole) ** 0.5,
    }
    bounds = {"loss": MAX_LOSS_ERROR, "gradient": MAX_GRADIENT_ERROR}
    for name, error in found.items():
        if not error <= bounds[name]:
            raise ValueError(f"the {name} of PyTorch differs by {error:.2g}, over {bounds[name]}")
    return {name: float(f"{error:.2g}") for name, error in found.items()}


@dataclass(frozen=True)
class Timings:
    """Measured times by back-end.

    Attributes:
        seconds: duration of each step.
        cpu_seconds: CPU time of each step, of all threads.
        rows: number of mask rows of each step.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians by back-end, and the ratios of pairs."""
        result: dict[str, Any] = {
            side: {
                "rows_per_s": _rate(self.rows, self.seconds[side]),
                "rows_per_cpu_s": _rate(self.rows, self.cpu_seconds[side]),
            }
            for side in self.seconds
        }
        for name, times in (("ratio", self.seconds), ("cpu_ratio", self.cpu_seconds)):
            ratios = sorted(a / b for a, b in zip(times[MLX], times[TORCH], strict=True))
            result[name] = round(statistics.median(ratios), 3)
            result[f"{name}_spread"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        return result


def _rate(counts: Sequence[int], seconds: Sequence[float]) -> float:
    return round(statistics.median(n / s for n, s in zip(counts, seconds, strict=True)), 2)


def measure(
    sides: dict[str, StepGradient],
    parameters: Parameters,
    data: Sequence[TokenSequence],
    *,
    repeats: int,
    on_status: Callable[[str], None] = lambda text: None,
) -> Timings:
    """Time steps of both back-ends alternately; they must be warm."""
    timings = Timings({side: [] for side in sides}, {side: [] for side in sides})
    result = None
    for turn in range(repeats):
        for side in sorted(sides, reverse=turn % 2 == 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = sides[side](parameters, data, range(len(data)), step=turn + 1)
            timings.cpu_seconds[side].append(time.process_time() - cpu_start)
            timings.seconds[side].append(time.perf_counter() - start)
        assert result is not None
        timings.rows.append(result.num_rows)
        on_status(f"Timed {turn + 1}/{repeats}")
    return timings


@command
@MODEL
@option("--repeats", default=3, type=click.IntRange(min=1), help="Number of pairs of steps.")
@option("--length", default=256, type=click.IntRange(min=8), help="Number of ids per sequence.")
@field_option(TrainSettings, "batch_size")
@field_option(TrainSettings, "num_anchors", default=64)
@field_option(TrainSettings, "num_draft_tokens")
@field_option(TrainSettings, "rank")
@field_option(TrainSettings, "candidates")
@field_option(TrainSettings, "rows_per_forward")
@AS_JSON
def main(
    *, model: str | None, repeats: int, length: int, as_json: bool, **options: int
) -> dict[str, Any]:
    """Time gradients by MLX and by PyTorch and print one JSON line."""
    from mlx_mtp.loading import load

    settings = TrainSettings.from_dict(options | {"teacher": "sample"})
    loaded, tokenizer = load(model, mtp=False, kernels=False)
    adapted = new_adapter(loaded, settings)
    data = sample_sequences(tokenizer, count=settings.batch_size, length=length)
    parameters = perturbed(trainable(adapted))
    with Status("Computing the first step ...", delay_s=0) as status:
        made = {
            side: make_gradient(
                adapted, TrainSettings.from_dict(settings.to_dict() | {"backend": side})
            )
            for side in (MLX, TORCH)
        }
        sides = {side: gradient for side, (gradient, *_) in made.items()}
        first = {
            side: gradient(parameters, data, range(len(data)), step=0)
            for side, gradient in sides.items()
        }
        agreement = differences(first[MLX], first[TORCH])
        timings = measure(sides, parameters, data, repeats=repeats, on_status=status.update)
    summary = timings.summary()
    if not as_json:
        print("\n".join(_lines(agreement, summary, made[TORCH][2])))
    summary |= {"agreement": agreement, "repeats": repeats, "length": length}
    summary |= options | {"threads": threads()}
    return summary | machine_info("torch", "transformers")


def _lines(agreement: dict[str, float], summary: dict[str, Any], line: str | None) -> list[str]:
    """The result as a small table."""
    lines = [
        f"{line}; loss within {agreement['loss']:.1e}, gradient within {agreement['gradient']:.1e}",
        f"{'':8}{'mask rows/s':>14}{'mask rows/CPU s':>18}",
        *(
            f"{side:8}{summary[side]['rows_per_s']:14.1f}{summary[side]['rows_per_cpu_s']:18.1f}"
            for side in (MLX, TORCH)
        ),
    ]
    low, high = summary["cpu_ratio_spread"]
    return [*lines, f"CPU time, mlx/torch: {summary['cpu_ratio']:.2f} ({low:.2f} to {high:.2f})"]


if __name__ == "__main__":
    main()
