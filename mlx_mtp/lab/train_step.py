"""Our optimiser step beside the same step in PyTorch: ``python -m mlx_mtp.lab.train_step``.

Both sides have the same float32 weights, sequences and mask blocks.  Before the clock starts they
must agree: in each term of the loss, in the norms of the gradient by kind of parameter, and in the
gradient itself; the exact loss is compared, whatever ``--candidates`` says.  The parameters are
shaken first, for those of a new adapter leave half of the gradient at zero.

Steps are then timed in turns and in alternating order: gradient, clipping, AdamW.  PyTorch has all
cores and the quicker of two ways to cut its forwards, ours and one forward a sequence.  Ratios are
those of pairs; above 1 we are quicker.  The last line is one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import click
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.lab.step_agreement import Agreement, compare
from mlx_mtp.lab.tokens_per_step import stamp
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.terminal import BadInput, Status, one_line
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import Parameters, StepGradient, blocks_of
from mlx_mtp.train.gradient.workers import Workers, WorkerSpec, one_blas_thread, worker_count
from mlx_mtp.train.loop import schedule
from mlx_mtp.train.settings import TrainSettings

if TYPE_CHECKING:
    from mlx_mtp.lab.torch_step import TorchStep


class OurStep:
    """Optimiser steps as ``train.loop`` does them.

    Args:
        model: from ``adapter.new_adapter``.
        settings: of the run.
        workers: processes that take a part.
    """

    def __init__(
        self, model: MTPModel, settings: TrainSettings, *, workers: Workers | None = None
    ) -> None:
        self._settings, self._workers = settings, workers
        self._gradient = StepGradient(model, settings)
        self._parameters = trainable(model)
        self._optimiser = optim.AdamW(
            learning_rate=schedule(settings), weight_decay=settings.weight_decay
        )
        self._optimiser.init(self._parameters)

    def __call__(
        self, data: Sequence[TokenSequence], chosen: Sequence[int], *, step: int
    ) -> tuple[int, int]:
        """Do a step; returns how many tokens and mask rows it had."""
        found = self._gradient(self._parameters, data, chosen, step=step, workers=self._workers)
        gradients, norm = optim.clip_grad_norm(found.gradients, self._settings.clip or math.inf)
        assert math.isfinite(float(np.array(norm)))
        self._parameters = self._optimiser.apply_gradients(gradients, self._parameters)
        mx.eval(self._parameters, self._optimiser.state)
        self._gradient.load(self._parameters)
        return found.num_tokens, found.num_rows


def sample_sequences(tokenizer: Any, *, count: int, length: int) -> list[TokenSequence]:
    """Cut sequences from the built-in prompts; all but their first quarter is answer.

    Args:
        tokenizer: from ``load``.
        count: how many.
        length: ids of each.
    """
    text = "\n\n".join(prompt.text for prompt in builtin_prompts())
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    ids *= -(-count * length // len(ids))
    answer = [at >= length // 4 for at in range(length)]
    starts = range(0, count * length, length)
    return [TokenSequence(ids[start : start + length], answer) for start in starts]


def torch_step(model: MTPModel, settings: TrainSettings, *, num_threads: int) -> TorchStep:
    """Make the rival.

    Raises:
        ValueError: PyTorch is missing, or the model is of another kind.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError('PyTorch is missing: pip install "mlx-mtp[convert]"') from None
    from mlx_mtp.lab.torch_step import TorchStep

    return TorchStep(model, settings, num_threads=num_threads)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timings:
    """What was timed.

    Attributes:
        seconds: of each step, by side.
        tokens, rows: of each step.
        torch_rows: most mask rows of a forward in PyTorch; None is one forward a sequence.
        tried: seconds of one step of PyTorch for each way to cut its forwards.
    """

    seconds: dict[str, list[float]]
    tokens: list[int]
    rows: list[int]
    torch_rows: int | None
    tried: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Medians by side, and the ratios of pairs."""
        found: dict[str, Any] = {}
        for side, seconds in self.seconds.items():
            found[side] = {
                "seconds": round(statistics.median(seconds), 4),
                "tokens_per_s": round(_rate(self.tokens, seconds), 2),
                "rows_per_s": round(_rate(self.rows, seconds), 2),
            }
        pairs = zip(self.seconds["torch"], self.seconds["ours"], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        found["ratio"] = round(statistics.median(ratios), 3)
        found["ratio_spread"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        found["torch_rows_per_forward"] = self.torch_rows or "a sequence"
        found["torch_tried_s"] = self.tried
        return found


def _rate(counts: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(n / each for n, each in zip(counts, seconds, strict=True))


def measure(
    ours: OurStep,
    rival: TorchStep,
    data: Sequence[TokenSequence],
    settings: TrainSettings,
    *,
    repeats: int,
    say: Callable[[str], None] = lambda text: None,
) -> Timings:
    """Warm both sides up, choose how PyTorch cuts its forwards, and time steps in turns.

    PyTorch is warm from ``compare``, and its two trials warm it further.
    """
    chosen = range(len(data))
    say("Warming up ...")
    for step in range(2):  # the first is computed without the workers, see ``StepGradient``
        ours(data, chosen, step=step)
    ways = {str(settings.rows_per_forward): settings.rows_per_forward, "a sequence": None}
    tried = {}
    for name, rows in ways.items():
        say(f"Trying PyTorch with forwards of {name} ...")
        tried[name] = round(_seconds(lambda r=rows: rival(data, chosen, step=0, most_rows=r)), 4)
    most_rows = ways[min(tried, key=lambda name: tried[name])]
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    tokens, counts = [], []
    for turn in range(repeats):
        step = turn + 2
        blocks = [blocks_of(data[at], settings, key=(step, at)) for at in chosen]
        counts.append(sum(each.num_rows for each in blocks))
        tokens.append(sum(len(each.ids) for each in data))
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda step=step: ours(data, chosen, step=step),
            "torch": lambda step=step: rival(data, chosen, step=step, most_rows=most_rows),
        }
        for side in sorted(runs, reverse=turn % 2 == 1):
            seconds[side].append(_seconds(runs[side]))
        say(f"Timed {turn + 1}/{repeats}")
    return Timings(seconds, tokens, counts, most_rows, tried)


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--batch-size", default=4, show_default=True, help="Sequences of a step.")
@click.option("--length", default=256, show_default=True, help="Ids of a sequence.")
@click.option("--num-anchors", default=64, show_default=True, help="Mask blocks of a sequence.")
@click.option("--num-draft-tokens", default=8, show_default=True, help="Masks of a block.")
@click.option("--rank", default=32, show_default=True)
@click.option("--workers", default=0, show_default=True, help="Our processes; 0 as in training.")
@click.option("--candidates", default=0, show_default=True, help="Of our loss; 0 is all tokens.")
@click.option("--json", "only_json", is_flag=True, help="Print the JSON line alone.")
def main(**options: Any) -> None:
    """Time an optimiser step beside the same step in PyTorch and print one JSON line."""
    try:
        run(**options)
    except ValueError as error:
        raise BadInput(one_line(error)) from None


def run(*, model: str | None, repeats: int, length: int, only_json: bool, **options: int) -> None:
    """Do what the options say; see ``main``."""
    from mlx_mtp.loading import load

    if length < 8:
        raise ValueError(f"length must be at least 8, got {length}")
    settings = TrainSettings.from_dict(options)
    loaded, tokenizer = load(model, mtp=False, kernels=False)
    adapted = new_adapter(loaded, settings)
    data = sample_sequences(tokenizer, count=settings.batch_size, length=length)
    num_threads = _cores()
    rival = torch_step(adapted, settings, num_threads=num_threads)
    count = worker_count(settings.workers, batch_size=settings.batch_size)
    with Status("Comparing the two sides ...", delay_s=0) as line:
        agreement = compare(adapted, rival, settings, data, most_rows=settings.rows_per_forward)
        agreement.check()
        with _helpers(model, settings, data, count=count, like=trainable(adapted)) as workers:
            ours = OurStep(adapted, settings, workers=workers)
            timings = measure(ours, rival, data, settings, repeats=repeats, say=line.update)
    summary = timings.summary()
    if not only_json:
        print("\n".join(_lines(agreement, summary)))
    summary |= {"agreement": agreement.to_dict(), "repeats": repeats, "length": length}
    summary |= options | {"processes": count, "torch_threads": num_threads}
    made_with = stamp()
    made_with["versions"]["torch"] = version("torch")
    print(json.dumps(summary | made_with))


@contextlib.contextmanager
def _helpers(
    model: str | None,
    settings: TrainSettings,
    data: Sequence[TokenSequence],
    *,
    count: int,
    like: Parameters,
) -> Iterator[Workers | None]:
    """The processes of a training run, where there is more than one."""
    if count == 1:
        yield None
        return
    spec = WorkerSpec(model=model, settings=settings)
    with Workers(spec, data, count=count, like=like) as workers, one_blas_thread(True):
        yield workers


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lines(agreement: Agreement, summary: dict[str, Any]) -> list[str]:
    """The result as a small table."""
    told = [
        f"same step: losses within {max(agreement.losses.values()):.1e}, "
        f"gradient norms within {max(agreement.norms.values()):.1e}",
        f"{'':8}{'step s':>10}{'tokens/s':>12}{'mask rows/s':>13}",
    ]
    for side in ("ours", "torch"):
        row = summary[side]
        told.append(
            f"{side:8}{row['seconds']:10.3f}{row['tokens_per_s']:12.1f}{row['rows_per_s']:13.1f}"
        )
    low, high = summary["ratio_spread"]
    return [*told, f"ratio ours/torch {summary['ratio']:.2f} ({low:.2f} to {high:.2f})"]


if __name__ == "__main__":
    main()
