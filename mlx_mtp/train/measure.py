"""Rates of this machine with this model, from about a minute of the work that a run does.

Text is generated as for a run and thrown away.  Training steps and evaluations are those of random
sequences: their time depends on lengths only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.evaluation.acceptance import evaluate
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.data.pipeline import make_records
from mlx_mtp.train.data.records import Record
from mlx_mtp.train.gradient.adapter import trainable
from mlx_mtp.train.gradient.backend import make_gradient
from mlx_mtp.train.gradient.workers import Workers, WorkerSpec, one_blas_thread, worker_count
from mlx_mtp.train.recipe import ANCHORS, CANDIDATES, DROP_LATE, ORDINARY_ROW, Rates, Task
from mlx_mtp.train.settings import DataSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_TEXT_PART, _STEP_PART = 0.4, 0.4  # of the time; the rest is for evaluations
_TRAINED = 1.2  # an evaluation with accepted drafts takes longer than one of new weights


class _TimeIsUp(Exception):
    """Stops a measurement."""


def measure(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    *,
    task: Task,
    source: Sequence[Record],
    data: DataSettings,
    spec: WorkerSpec,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Rates:
    """Measure the rates from which the recipe of a run is chosen.

    Args:
        model: with a new adapter; it is not changed.
        tokenizer: of the model.
        task: gives the lengths of the texts.
        source: the user's data, if any.
        data: settings of the text.
        spec: how other processes load the model, and the settings of the run.
        seconds: time for it; at least one batch, one step and one evaluation are done.
        clock: current time in seconds.
    """
    text_tps = 0.0
    if task.generated_tokens:
        text_tps = _text_tps(
            model, tokenizer, source, data, seconds=_TEXT_PART * seconds, clock=clock
        )
    sequences = _random_sequences(task, vocab_size=model.vocab_size)
    rows_per_s = _rows_per_s(model, sequences, spec, seconds=_STEP_PART * seconds, clock=clock)
    evaluate(model, sequences[:1], rows_per_forward=spec.settings.rows_per_forward)  # compiles
    start = clock()
    evaluate(model, sequences[1:2], rows_per_forward=spec.settings.rows_per_forward)
    return Rates(
        text_tps=text_tps,
        rows_per_s=rows_per_s,
        eval_text_s=max(_TRAINED * (clock() - start), 1e-6),
    )


def _text_tps(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: Sequence[Record],
    data: DataSettings,
    *,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    """Generated tokens per second, after the first ones."""
    marks: list[tuple[float, int]] = []  # times, and tokens generated until then

    def on_progress(progress: DistilProgress) -> None:
        if progress.num_tokens:
            marks.append((clock(), progress.num_tokens))
        if len(marks) > 1 and marks[-1][0] - marks[0][0] >= seconds:
            raise _TimeIsUp

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_TimeIsUp):
        path = Path(folder) / "data.jsonl"
        make_records(model, tokenizer, source, path, data, progress=on_progress)
    (start, first), (end, last) = marks[0], marks[-1]
    return max(last - first, 1) / max(end - start, 1e-6)


def _random_sequences(task: Task, *, vocab_size: int, count: int = 16) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    length = max(4, round(task.sequence_tokens))
    prompt = max(1, length - max(3, round(task.answer_tokens)))
    answer = [index >= prompt for index in range(length)]
    return [
        TokenSequence(ids=rng.integers(0, vocab_size, length).tolist(), answer=answer)
        for _ in range(count)
    ]


def _rows_per_s(
    model: MTPModel,
    sequences: list[TokenSequence],
    spec: WorkerSpec,
    *,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    """Rows of training steps per second, after a first step."""
    on_cpu = mx.default_device().type == mx.cpu
    changes: dict[str, Any] = {"num_anchors": ANCHORS, "drop_late": DROP_LATE}
    if on_cpu and model.vocab_size > 2 * CANDIDATES:
        changes["candidates"] = CANDIDATES
    settings = dataclasses.replace(spec.settings, **changes)
    processes = worker_count(settings.workers, batch_size=len(sequences))
    gradient, settings, _ = make_gradient(model, settings, num_threads=1 if processes > 1 else 0)
    processes = processes if gradient.shares_cores else 1
    parameters = trainable(model)
    spec = dataclasses.replace(spec, settings=settings)
    with _workers(spec, sequences, count=processes, like=parameters) as workers:
        cost, elapsed = 0.0, 0.0
        for step in itertools.count():
            chosen = [(step * processes + place) % len(sequences) for place in range(processes)]
            start = clock()
            result = gradient(parameters, sequences, chosen, step=step, workers=workers)
            mx.eval(result.gradients)
            took = clock() - start
            if step > 0 or took > seconds:  # the first step compiles, unless it is all there is
                cost += result.num_rows + ORDINARY_ROW * result.num_tokens
                elapsed += took
            if elapsed >= seconds:
                break
    gradient.load(parameters)
    return cost / max(elapsed, 1e-6)


@contextlib.contextmanager
def _workers(
    spec: WorkerSpec, sequences: list[TokenSequence], *, count: int, like: dict[str, mx.array]
) -> Iterator[Workers | None]:
    """The processes that share the steps of a run, if there is more than one."""
    if count == 1:
        yield None
        return
    with Workers(spec, sequences, count=count, like=like) as workers, one_blas_thread(True):
        yield workers
