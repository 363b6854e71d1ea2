"""The training loop: steps, reports, evaluations, checkpoints; it tells events and prints nothing.

The adapter folder holds the best adapter so far and ``training/`` what a run needs to go on: the
newest states (weights, optimiser, step) and the history.  A run that was killed goes on from its
newest state and gives, in float32 on a CPU, the very bits that it would have given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_mtp.evaluation.acceptance import Evaluation, evaluate
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import remove_drafts
from mlx_mtp.train.gradient.adapter import adapter_tensors, trainable
from mlx_mtp.train.gradient.losses import next_token_loss
from mlx_mtp.train.gradient.step import (
    StepGradient,
    StepResult,
    checkpoint_layers,
    sequences_of_step,
)
from mlx_mtp.train.gradient.workers import Workers, WorkerSpec, one_blas_thread, worker_count
from mlx_mtp.train.run.checkpoint import (
    OPTIMISER,
    PARAMETERS,
    TrainState,
    newest_state,
    remove_old_states,
    save_adapter,
    save_state,
    under,
    write_json,
)
from mlx_mtp.train.run.events import Evaluated, Event, Noticed, Reported, Saved, Stepped
from mlx_mtp.train.run.history import History
from mlx_mtp.train.settings import TrainSettings

TRAINING = "training"


@dataclass(frozen=True)
class TrainData:
    """What is trained on.

    Attributes:
        train: sequences of the steps.
        held_out: sequences of the evaluations.
        data_hash: tells one set of records from another.
    """

    train: list[TokenSequence]
    held_out: list[TokenSequence]
    data_hash: str


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        finished: False if it was asked to stop before its end.
        best: the best evaluation, whose adapter lies in the folder.
        best_step: the step that it was made at.
    """

    step: int
    finished: bool
    best: Evaluation | None
    best_step: int


def train(
    model: MTPModel,
    data: TrainData,
    settings: TrainSettings,
    output: Path,
    *,
    resume: bool = False,
    workers: WorkerSpec | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train an adapter.

    Args:
        model: from ``adapter.new_adapter``.
        data: sequences to train on and to hold out.
        settings: of the run; when it is resumed only how long it is, what is shown and how its
            forwards are cut may differ (the last two not for the very same bits).
        output: the adapter folder.
        resume: go on from the newest state in it.
        workers: how other processes load the same model; None trains in this one alone.
        on_event: told what happens.
        should_stop: asked after each step; when it says so the run saves and ends.

    Raises:
        ValueError: the loss or the gradient is not finite (the message says in which sequences),
            there is no state to resume from, or it is of another run.
        OSError: a file cannot be written; the states that were there before still are.
    """
    model.scope.gated = settings.gate
    if settings.grad_checkpoint:
        checkpoint_layers(model)
    run = _Run(model, data, settings, output, on_event)
    damaged: list[str] = []
    state = newest_state(output / TRAINING, tell=damaged.append) if resume else None
    for line in damaged:
        on_event(Noticed(step=state.step if state else 0, text=line))
    if resume and state is None:
        raise ValueError(f"{output} holds no checkpoint to resume from")
    with History(run.folder / "history.jsonl", keep=run.restore(state)) as history:
        run.history = history  # held, so nobody else writes here
        remove_drafts(output)
        remove_drafts(run.folder)
        if state is not None:
            remove_old_states(run.folder, state.step)
        with run.helped_by(workers), one_blas_thread(run.workers is not None):
            return run.go_on(should_stop)


@dataclass
class _Sums:
    """What a report is the mean of."""

    steps: int = 0
    loss: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_rows: int = 0
    seconds: float = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        self.steps += 1
        self.loss += result.loss
        for name, value in result.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value
        self.num_tokens += result.num_tokens
        self.num_rows += result.num_rows
        self.seconds += seconds


class _Run:
    """A run in progress."""

    def __init__(
        self,
        model: MTPModel,
        data: TrainData,
        settings: TrainSettings,
        output: Path,
        on_event: Callable[[Event], None],
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.output, self.folder, self.on_event = output, output / TRAINING, on_event
        self.gradient = StepGradient(model, settings)
        self.parameters = trainable(model)
        self.optimiser = optim.AdamW(
            learning_rate=schedule(settings), weight_decay=settings.weight_decay
        )
        self.optimiser.init(self.parameters)
        self.step, self.sums, self.grad_norm = 0, _Sums(), 0.0
        self.best: Evaluation | None = None
        self.best_step = 0
        self.history: History | None = None
        self.workers: Workers | None = None

    def helped_by(self, spec: WorkerSpec | None) -> contextlib.AbstractContextManager[Any]:
        """Start the workers, where more than one process is wanted."""
        count = worker_count(self.settings.workers, batch_size=self.settings.batch_size)
        if spec is None or count == 1:
            return contextlib.nullcontext()
        self.workers = Workers(spec, self.data.train, count=count, like=self.parameters)
        return self.workers

    def restore(self, state: TrainState | None) -> int:
        """Take over a state, or begin; returns how many lines of the history stand."""
        identity = self._identity()
        if state is None:
            write_json(self.folder / "settings.json", identity | self.settings.to_dict())
            return 0
        others = [key for key in identity if state.values["identity"].get(key) != identity[key]]
        if others == ["processes"]:
            count = state.values["identity"]["processes"]
            raise ValueError(
                f"{self.output} was begun with --workers {count}, on which its bits depend: "
                "resume it with that"
            )
        if others:
            raise ValueError(
                f"{self.output} holds a run of other {', '.join(others)}: it cannot be resumed"
            )
        self.step = state.step
        self.parameters = under(PARAMETERS, state.tensors)
        self.optimiser.state = _nested(under(OPTIMISER, state.tensors), self.parameters)
        self.sums = _Sums(**state.values["sums"])
        if state.values["best"]:
            self.best = Evaluation.from_dict(state.values["best"])
        self.best_step = state.values["best_step"]
        self.gradient.load(self.parameters)
        return state.values["history_lines"]

    def go_on(self, should_stop: Callable[[], bool]) -> TrainResult:
        """Do the steps that are left."""
        settings = self.settings
        if self.best is None:  # a run that was stopped at step 0 has this behind it
            self._evaluate()
            self._save()
        while self.step < settings.iters and not should_stop():
            self._do_step()
            ends = self.step == settings.iters
            if ends or self.step % settings.steps_per_report == 0:
                self._report()
            if ends or self.step % settings.steps_per_eval == 0:
                self._evaluate()
            if ends or self.step % settings.save_every == 0:
                self._save()
        finished = self.step >= settings.iters
        if not finished and self.step % settings.save_every:
            self._save()
        return TrainResult(self.step, finished, self.best, self.best_step)

    def _do_step(self) -> None:
        began = time.perf_counter()
        settings = self.settings
        chosen = sequences_of_step(
            self.step,
            num_sequences=len(self.data.train),
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        found = self.gradient(
            self.parameters, self.data.train, chosen, step=self.step, workers=self.workers
        )
        gradients, norm = optim.clip_grad_norm(found.gradients, settings.clip or math.inf)
        self.grad_norm = float(np.array(norm))
        if not (math.isfinite(found.loss) and math.isfinite(self.grad_norm)):
            what = "gradient" if math.isfinite(found.loss) else "loss"
            numbers = ", ".join(str(at) for at in chosen)
            raise ValueError(
                f"the {what} of step {self.step + 1} is not finite, in training sequences "
                f"{numbers} (from 0); a lower learning rate may help"
            )
        self.parameters = self.optimiser.apply_gradients(gradients, self.parameters)
        mx.eval(self.parameters, self.optimiser.state)
        self.gradient.load(self.parameters)
        self.step += 1
        seconds = time.perf_counter() - began
        self.sums.add(found, seconds)
        self.on_event(Stepped(step=self.step, iters=settings.iters, seconds=seconds))

    def _report(self) -> None:
        sums, self.sums = self.sums, _Sums()
        seconds = max(sums.seconds, 1e-9)
        report = Reported(
            step=self.step,
            loss=sums.loss / sums.steps,
            terms={name: value / sums.steps for name, value in sums.terms.items()},
            learning_rate=float(np.array(self.optimiser.learning_rate)),
            grad_norm=self.grad_norm,
            tokens_per_s=sums.num_tokens / seconds,
            rows_per_s=sums.num_rows / seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )
        self._write("report", dataclasses.asdict(report) | {"seconds": seconds})
        self.on_event(report)

    def _evaluate(self) -> None:
        count = self.settings.val_batches
        chosen = self.data.held_out if count == -1 else self.data.held_out[:count]
        evaluation = evaluate(self.model, chosen, rows_per_forward=self.settings.rows_per_forward)
        loss = next_token_loss(self.model, chosen)
        is_best = self.best is None or evaluation.tokens_per_step > self.best.tokens_per_step
        if is_best:
            self.best, self.best_step = evaluation, self.step
            self._save_adapter()
        record = evaluation.to_dict() | {"next_token_loss": loss, "is_best": is_best}
        self._write("evaluation", {"step": self.step} | record)
        self.on_event(
            Evaluated(step=self.step, evaluation=evaluation, next_token_loss=loss, is_best=is_best)
        )

    def _save_adapter(self) -> None:
        """Write the adapter, but for the ablation's, which would decode with the gate on."""
        assert self.model.config is not None and self.best is not None
        if self.settings.gate:
            config = dataclasses.replace(self.model.config, acceptance=self.best.falling_shares())
            save_adapter(self.output, config, adapter_tensors(self.parameters))

    def _save(self) -> None:
        assert self.history is not None
        moments = _flat(self.optimiser.state)
        tensors = {PARAMETERS + name: value for name, value in self.parameters.items()}
        tensors |= {OPTIMISER + name: value for name, value in moments.items()}
        values = {
            "identity": self._identity(),
            "sums": dataclasses.asdict(self.sums),
            "best": self.best and self.best.to_dict(),
            "best_step": self.best_step,
            "history_lines": len(self.history),
        }
        path = save_state(self.folder, TrainState(step=self.step, tensors=tensors, values=values))
        self.on_event(Saved(step=self.step, path=path))

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        assert self.history is not None
        self.history.append({"kind": kind} | values)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on bit for bit."""
        assert self.model.config is not None
        settings = self.settings.to_dict()
        return {
            "base_fingerprint": self.model.config.base_fingerprint,
            "data_hash": self.data.data_hash,
            "processes": worker_count(self.settings.workers, batch_size=self.settings.batch_size),
        } | {name: value for name, value in settings.items() if name not in _FREE}


_FREE = (
    "iters",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
    "val_batches",
    "workers",
    "rows_per_forward",
    "grad_checkpoint",
)


def schedule(settings: TrainSettings) -> Callable[[mx.array], mx.array]:
    """Learning rate by step: a linear warm-up, then half a cosine down to its lowest."""
    peak, warmup = settings.learning_rate, min(settings.warmup, settings.iters - 1)
    fall = optim.cosine_decay(peak, settings.iters - warmup, end=peak * settings.min_learning_rate)
    if warmup == 0:
        return fall
    rise = optim.linear_schedule(peak / (warmup + 1), peak, steps=warmup)
    return optim.join_schedules([rise, fall], [warmup])


def peak_memory_bytes() -> int:
    """Most memory used so far: MLX's count on a GPU, the whole process's on a CPU."""
    if mx.default_device().type != mx.cpu:
        return mx.get_peak_memory()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _flat(state: Any) -> dict[str, mx.array]:
    """The optimiser's state as tensors by name: numbers of its own and moments of parameters."""
    found = {}
    for name, value in state.items():
        found |= (
            {f"{name}.{part}": each for part, each in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return found


def _nested(tensors: dict[str, mx.array], parameters: dict[str, mx.array]) -> dict[str, Any]:
    """The optimiser's state from what ``_flat`` gave."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        owner, _, part = name.rpartition(".")
        if owner in parameters:
            found.setdefault(owner, {})[part] = value
        else:
            found[name] = value
    return found
