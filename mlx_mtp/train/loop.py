"""The training loop: steps, reports, evaluations, checkpoints; it tells events and prints nothing.

The adapter folder holds the best adapter so far and ``training/`` what a run needs to go on: the
newest states (weights, optimiser, step) and the history.  A run that was killed goes on from its
newest state and gives, in float32 on a CPU, the very bits that it would have given.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_mtp.model import MTPModel
from mlx_mtp.train import sequences as texts
from mlx_mtp.train.adapter import adapter_tensors
from mlx_mtp.train.checkpoint import TrainState, newest_state, save_adapter, save_state, write_json
from mlx_mtp.train.evaluate import Evaluation, evaluate
from mlx_mtp.train.events import Evaluated, Event, Reported, Saved, Stepped
from mlx_mtp.train.history import History
from mlx_mtp.train.losses import next_token_loss
from mlx_mtp.train.settings import TrainSettings
from mlx_mtp.train.step import StepGradient, StepResult, checkpoint_layers, sequences_of_step

TRAINING = "training"
_PARAMETERS, _OPTIMISER = "parameters.", "optimizer."


@dataclass(frozen=True)
class TrainData:
    """What is trained on.

    Attributes:
        train: sequences of the steps.
        held_out: sequences of the evaluations.
        data_hash: tells one set of records from another.
    """

    train: list[texts.Sequence]
    held_out: list[texts.Sequence]
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
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train an adapter.

    Args:
        model: from ``adapter.new_adapter``.
        data: sequences to train on and to hold out.
        settings: of the run; those that a run was begun with may only differ in how long it is
            and what is shown.
        output: the adapter folder.
        resume: go on from the newest state in it.
        on_event: told what happens.
        should_stop: asked after each step; when it says so the run saves and ends.

    Raises:
        ValueError: the loss or the gradient is not finite (the message says in which sequences),
            there is no state to resume from, or it is of another run.
        OSError: a file cannot be written; the states that were there before still are.
    """
    model.gated = settings.gate
    if settings.grad_checkpoint:
        checkpoint_layers(model)
    run = _Run(model, data, settings, output, on_event)
    state = newest_state(output / TRAINING) if resume else None
    if resume and state is None:
        raise ValueError(f"{output} holds no checkpoint to resume from")
    with History(run.folder / "history.jsonl", keep=run.restore(state)) as history:
        run.history = history
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
        self.parameters = tree_map(
            lambda each: each.astype(mx.float32), model.trainable_parameters()
        )
        self.optimiser = optim.AdamW(
            learning_rate=schedule(settings), weight_decay=settings.weight_decay
        )
        self.optimiser.init(self.parameters)
        self.step, self.sums, self.grad_norm = 0, _Sums(), 0.0
        self.best: Evaluation | None = None
        self.best_step = 0
        self.history: History | None = None

    def restore(self, state: TrainState | None) -> int:
        """Take over a state, or begin; returns how many lines of the history stand."""
        identity = self._identity()
        if state is None:
            write_json(self.folder / "settings.json", identity | self.settings.to_dict())
            return 0
        others = [key for key in identity if state.values["identity"].get(key) != identity[key]]
        if others:
            raise ValueError(
                f"{self.output} holds a run of other {', '.join(others)}: it cannot be resumed"
            )
        self.step = state.step
        self.parameters = _tree(state.tensors, _PARAMETERS)
        self.optimiser.state = _tree(state.tensors, _OPTIMISER)
        self.sums = _Sums(**state.values["sums"])
        if state.values["best"]:
            self.best = Evaluation.from_dict(state.values["best"])
        self.best_step = state.values["best_step"]
        self.gradient.load(self.parameters)
        return state.values["history_lines"]

    def go_on(self, should_stop: Callable[[], bool]) -> TrainResult:
        """Do the steps that are left."""
        settings = self.settings
        if self.step == 0:
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
            self.parameters, [self.data.train[at] for at in chosen], step=self.step
        )
        gradients, norm = optim.clip_grad_norm(found.gradients, settings.clip or math.inf)
        self.grad_norm = float(norm.item())
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
            learning_rate=float(cast(Any, self.optimiser.learning_rate).item()),
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
            assert self.model.config is not None
            save_adapter(self.output, self.model.config, adapter_tensors(self.parameters))
        record = evaluation.to_dict() | {"next_token_loss": loss, "is_best": is_best}
        self._write("evaluation", {"step": self.step} | record)
        self.on_event(
            Evaluated(step=self.step, evaluation=evaluation, next_token_loss=loss, is_best=is_best)
        )

    def _save(self) -> None:
        assert self.history is not None
        tensors = _flat(self.parameters, _PARAMETERS) | _flat(self.optimiser.state, _OPTIMISER)
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
        } | {name: value for name, value in settings.items() if name not in _FREE}


_FREE = ("iters", "steps_per_report", "steps_per_eval", "save_every", "val_batches")


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


def _flat(tree: Any, prefix: str) -> dict[str, mx.array]:
    return {prefix + name: value for name, value in cast(Any, tree_flatten(tree))}


def _tree(tensors: dict[str, mx.array], prefix: str) -> Any:
    """The tree whose leaves lie under a prefix."""
    chosen = [
        (name.removeprefix(prefix), value)
        for name, value in tensors.items()
        if name.startswith(prefix)
    ]
    return tree_unflatten(chosen)
