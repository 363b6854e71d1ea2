"""Our optimiser step compared with the same step in PyTorch: ``python -m mlx_mtp.lab.train_step``.

Both sides have the same float32 weights, sequences and mask blocks.  Before the clock starts they
must agree in each term of the loss, in the norms of the gradient by kind of parameter, and in the
gradient itself; the exact loss is compared, whatever ``--candidates`` is.  For this comparison
noise is added to the parameters, because half of a new adapter's gradient is zero.

Steps are then timed in alternating order: gradient, clipping, AdamW.  PyTorch has all cores and the
faster of two ways to split its forwards: ours, and one forward per sequence.  Ratios are those of
pairs; above 1 our step is faster.  ``OMP_NUM_THREADS`` limits both.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.bench.machine_state import threads
from mlx_mtp.cli.options import AS_JSON, MODEL, field_option, option
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.lab.step_agreement import Agreement, compare
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.terminal import Status
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import Parameters, StepGradient, blocks_of
from mlx_mtp.train.gradient.workers import Workers, WorkerSpec, one_blas_thread, worker_count
from mlx_mtp.train.optimiser import Optimiser
from mlx_mtp.train.settings import TrainSettings

if TYPE_CHECKING:
    from mlx_mtp.lab.torch_step import TorchStep


class OurStep:
    """Optimiser steps as in ``train.loop``.

    Args:
        model: from ``adapter.new_adapter``.
        settings: settings of the run.
        workers: processes that share the work.
    """

    def __init__(
        self, model: MTPModel, settings: TrainSettings, *, workers: Workers | None = None
    ) -> None:
        self._workers = workers
        self._gradient = StepGradient(model, settings)
        self._optimiser = Optimiser(settings, trainable(model))

    def __call__(self, data: Sequence[TokenSequence], chosen: Sequence[int], *, step: int) -> None:
        """Run a step on the sequences with the indices ``chosen``."""
        result = self._gradient(
            self._optimiser.parameters, data, chosen, step=step, workers=self._workers
        )
        gradients, norm = self._optimiser.clip(result.gradients)
        assert math.isfinite(norm)
        self._optimiser.update(gradients)
        self._gradient.load(self._optimiser.parameters)


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


def torch_step(model: MTPModel, settings: TrainSettings, *, num_threads: int) -> TorchStep:
    """Make PyTorch's side.

    Raises:
        ValueError: PyTorch is missing, or the model is not supported.
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
    """Measured times.

    Attributes:
        seconds: duration of each step, by side.
        tokens: number of tokens of each step.
        rows: number of mask rows of each step.
        torch_rows: maximum mask rows per forward in PyTorch; None is one forward per sequence.
        tried: seconds of one step of PyTorch for each way to split its forwards.
    """

    seconds: dict[str, list[float]]
    tokens: list[int]
    rows: list[int]
    torch_rows: int | None
    tried: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Medians by side, and the ratios of pairs."""
        sides: dict[str, Any] = {
            side: {
                "seconds": round(statistics.median(seconds), 4),
                "tokens_per_s": round(_rate(self.tokens, seconds), 2),
                "rows_per_s": round(_rate(self.rows, seconds), 2),
            }
            for side, seconds in self.seconds.items()
        }
        pairs = zip(self.seconds["torch"], self.seconds["ours"], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        return sides | {
            "ratio": round(statistics.median(ratios), 3),
            "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            "torch_rows_per_forward": self.torch_rows or "a sequence",
            "torch_tried_s": self.tried,
        }


def _rate(counts: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(n / s for n, s in zip(counts, seconds, strict=True))


def measure(
    ours: OurStep,
    theirs: TorchStep,
    data: Sequence[TokenSequence],
    settings: TrainSettings,
    *,
    repeats: int,
    on_status: Callable[[str], None] = lambda text: None,
) -> Timings:
    """Warm both sides up, choose how PyTorch splits its forwards, and time steps alternately.

    PyTorch is warm after ``compare`` and its two trials.
    """
    chosen = range(len(data))
    on_status("Warming up ...")
    for step in range(2):  # the first is computed without the workers, see ``StepGradient``
        ours(data, chosen, step=step)
    ways = {str(settings.rows_per_forward): settings.rows_per_forward, "a sequence": None}
    tried = {}
    for name, rows in ways.items():
        on_status(f"Trying PyTorch with forwards of {name} ...")
        tried[name] = round(_seconds(lambda r=rows: theirs(data, chosen, step=0, max_rows=r)), 4)
    max_rows = ways[min(tried, key=lambda name: tried[name])]
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    tokens, counts = [], []
    for turn in range(repeats):
        step = turn + 2
        blocks = [blocks_of(data[i], settings, key=(step, i)) for i in chosen]
        counts.append(sum(block.num_rows for block in blocks))
        tokens.append(sum(len(sequence.ids) for sequence in data))
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda step=step: ours(data, chosen, step=step),
            "torch": lambda step=step: theirs(data, chosen, step=step, max_rows=max_rows),
        }
        for side in sorted(runs, reverse=turn % 2 == 1):
            seconds[side].append(_seconds(runs[side]))
        on_status(f"Timed {turn + 1}/{repeats}")
    return Timings(seconds, tokens, counts, max_rows, tried)


@command
@MODEL
@option("--repeats", default=3, type=click.IntRange(min=1), help="Number of pairs of steps.")
@option("--length", default=256, type=click.IntRange(min=8), help="Number of ids per sequence.")
@field_option(TrainSettings, "batch_size")
@field_option(TrainSettings, "num_anchors", default=64)
@field_option(TrainSettings, "num_draft_tokens")
@field_option(TrainSettings, "rank")
@field_option(TrainSettings, "workers")
@field_option(TrainSettings, "candidates")
@AS_JSON
def main(
    *, model: str | None, repeats: int, length: int, as_json: bool, **options: int
) -> dict[str, Any]:
    """Time an optimiser step and the same step in PyTorch and print one JSON line."""
    from mlx_mtp.loading import load

    settings = TrainSettings.from_dict(options)
    loaded, tokenizer = load(model, mtp=False, kernels=False)
    adapted = new_adapter(loaded, settings)
    data = sample_sequences(tokenizer, count=settings.batch_size, length=length)
    num_threads = threads()
    theirs = torch_step(adapted, settings, num_threads=num_threads)
    count = worker_count(settings.workers, batch_size=settings.batch_size)
    with Status("Comparing the two sides ...", delay_s=0) as status:
        agreement = compare(adapted, theirs, settings, data, max_rows=settings.rows_per_forward)
        agreement.check()
        with _processes(model, settings, data, count=count, like=trainable(adapted)) as workers:
            ours = OurStep(adapted, settings, workers=workers)
            timings = measure(
                ours, theirs, data, settings, repeats=repeats, on_status=status.update
            )
    summary = timings.summary()
    if not as_json:
        print("\n".join(_lines(agreement, summary)))
    summary |= {"agreement": agreement.to_dict(), "repeats": repeats, "length": length}
    summary |= options | {"processes": count, "torch_threads": num_threads}
    return summary | machine_info("torch")


@contextlib.contextmanager
def _processes(
    model: str | None,
    settings: TrainSettings,
    data: Sequence[TokenSequence],
    *,
    count: int,
    like: Parameters,
) -> Iterator[Workers | None]:
    """The processes of a training run; None if there is only one."""
    if count == 1:
        yield None
        return
    spec = WorkerSpec(model=model, settings=settings)
    with Workers(spec, data, count=count, like=like) as workers, one_blas_thread(True):
        yield workers


def _lines(agreement: Agreement, summary: dict[str, Any]) -> list[str]:
    """The result as a small table."""
    lines = [
        f"same step: losses within {max(agreement.losses.values()):.1e}, "
        f"gradient norms within {max(agreement.norms.values()):.1e}",
        f"{'':8}{'step s':>10}{'tokens/s':>12}{'mask rows/s':>13}",
    ]
    for side in ("ours", "torch"):
        seconds, tokens, rows = summary[side].values()
        lines.append(f"{side:8}{seconds:10.3f}{tokens:12.1f}{rows:13.1f}")
    low, high = summary["ratio_spread"]
    return [*lines, f"ratio ours/torch {summary['ratio']:.2f} ({low:.2f} to {high:.2f})"]


if __name__ == "__main__":
    main()
