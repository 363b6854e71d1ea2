"""The training loop: steps, reports, evaluations and checkpoints, reported as events.

The adapter folder contains the best adapter so far, and ``training/`` what a run needs to resume:
the newest states (weights, optimiser, step) and the history.  A run that was killed resumes from
its newest state and gives, in float32 on a CPU, the same bits as without the interruption.
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

from mlx_mtp.evaluation.acceptance import Evaluation, evaluate
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.evaluation.statistics import count_vocabulary
from mlx_mtp.model.fingerprint import is_fingerprint_of
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import remove_drafts
from mlx_mtp.train.gradient.adapter import adapter_tensors, trainable
from mlx_mtp.train.gradient.backend import make_gradient
from mlx_mtp.train.gradient.losses import next_token_loss
from mlx_mtp.train.gradient.step import (
    Parameters,
    StepResult,
    checkpoint_layers,
    sequences_of_step,
)
from mlx_mtp.train.gradient.weight_form import WeightForm
from mlx_mtp.train.gradient.workers import Workers, WorkerSpec, one_blas_thread, worker_count
from mlx_mtp.train.optimiser import Optimiser
from mlx_mtp.train.pace import Budget, Pace, Timing
from mlx_mtp.train.run.checkpoint import (
    RAW,
    TrainState,
    newest_state,
    remove_old_states,
    save_adapter,
    save_state,
    write_json,
)
from mlx_mtp.train.run.events import (
    Evaluated,
    Event,
    Noticed,
    Planned,
    Reported,
    Saved,
    Stepped,
)
from mlx_mtp.train.run.folder import HISTORY_FILE, SETTINGS_FILE, TRAINING
from mlx_mtp.train.run.history import History
from mlx_mtp.train.settings import MLX, TrainSettings


@dataclass(frozen=True)
class TrainData:
    """Sequences of a run.

    Attributes:
        train: sequences of the training steps.
        held_out: sequences of the evaluations.
        data_hash: hash of the records.
    """

    train: list[TokenSequence]
    held_out: list[TokenSequence]
    data_hash: str


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        step: number of training steps.
        finished: False if it was stopped early.
        best: the best evaluation, whose adapter is in the folder.
        best_step: step of that evaluation.
        best_weights: which weights of that step, ``raw`` or ``ema``.
    """

    step: int
    finished: bool
    best: Evaluation | None
    best_step: int
    best_weights: str = RAW


def train(
    model: MTPModel,
    data: TrainData,
    settings: TrainSettings,
    output: Path,
    *,
    resume: bool = False,
    budget: Budget | None = None,
    workers: WorkerSpec | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train an adapter.

    Args:
        model: from ``adapter.new_adapter``.
        data: sequences to train on and to evaluate on.
        settings: of the run; a resumed run may only change those in ``_FREE``.
        output: the adapter folder.
        resume: resume from the newest state in it.
        budget: time of the run, from which the number of steps is planned again at every
            checkpoint; None does ``settings.iters`` steps.
        workers: how other processes load the same model; None trains in this process only.
        on_event: called with each event.
        should_stop: called after each step; if True, the run saves and ends.

    Raises:
        ValueError: the loss or the gradient is not finite (the message names the sequences), there
            is no state to resume from, or it is of another run.
        OSError: a file cannot be written; earlier states are unchanged.
    """
    model.scope.gated = settings.gate
    if settings.grad_checkpoint:
        checkpoint_layers(model)
    run = _Run(model, data, settings, output, on_event, budget)
    damaged: list[str] = []
    state = newest_state(output / TRAINING, log=damaged.append) if resume else None
    for line in damaged:
        on_event(Noticed(step=state.step if state else 0, text=line))
    if resume and state is None:
        raise ValueError(f"{output} contains no checkpoint to resume from")
    with History(run.folder / HISTORY_FILE, keep=run.restore(state)) as history:
        run.history = history  # locked, so no other process writes here
        remove_drafts(output)
        remove_drafts(run.folder)
        if state is not None:
            remove_old_states(run.folder, state.step)
        with run.with_workers(workers), one_blas_thread(run.workers is not None):
            return run.finish(should_stop)


@dataclass
class _Sums:
    """Sums from which a report takes means."""

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
        budget: Budget | None,
    ) -> None:
        self.model, self.data = model, data
        self.budget, self.timing = budget, budget and budget.timing()
        self.clock = budget.clock if budget else time.perf_counter
        self.output, self.folder, self.on_event = output, output / TRAINING, on_event
        count = worker_count(settings.workers, batch_size=settings.batch_size)
        made = make_gradient(model, settings, num_threads=1 if count > 1 else 0)
        self.gradient, self.settings, line = made
        self.processes = count if self.gradient.shares_cores else 1
        if line is not None:
            on_event(Noticed(step=0, text=line))
        assert model.adapter_config is not None
        self.form = WeightForm(model.adapter_config)
        self.optimiser = Optimiser(settings, self.form.trained(trainable(model)))
        self.step, self.sums, self.grad_norm = 0, _Sums(), 0.0
        self.best: Evaluation | None = None
        self.best_step, self.best_weights = 0, RAW
        self.vocabulary = count_vocabulary(data.train, data.held_out)
        self.next_token_loss: float | None = None
        self.history: History | None = None
        self.workers: Workers | None = None

    def with_workers(self, spec: WorkerSpec | None) -> contextlib.AbstractContextManager[Any]:
        """Start the workers, if there is more than one process."""
        count = self.processes
        if spec is None or count == 1:
            return contextlib.nullcontext()
        settings = dataclasses.replace(spec.settings, backend=self.settings.backend)
        spec = dataclasses.replace(spec, settings=settings)
        self.workers = Workers(spec, self.data.train, count=count, like=self._weights())
        return self.workers

    def _weights(self) -> Parameters:
        """The model's weights in the next training step."""
        rounds = self.step >= round((1 - self.settings.quantized_share) * self.iters)
        return self.form.weights(self.optimiser.parameters, rounds=rounds)

    def restore(self, state: TrainState | None) -> int:
        """Load a state, or begin; return the number of history lines to keep."""
        identity = self._identity()
        if state is None:
            write_json(self.folder / SETTINGS_FILE, identity | self.settings.to_dict())
            return 0
        saved = state.values["identity"]
        defaults = TrainSettings(backend=MLX).to_dict()  # of settings that came after it began
        changed = [key for key in identity if saved.get(key, defaults.get(key)) != identity[key]]
        if is_fingerprint_of(self.model.base, saved.get("base_fingerprint")):  # a former one
            changed = [key for key in changed if key != "base_fingerprint"]
        if changed == ["processes"]:
            raise ValueError(
                f"the run in {self.output} began with --workers {saved['processes']}, on which its "
                "result depends. Resume it with that"
            )
        if changed:
            raise ValueError(
                f"the run in {self.output} began with a different {', '.join(changed)}: "
                "it cannot be resumed"
            )
        self.step = state.step
        self.optimiser.restore(state.tensors)
        self.sums = _Sums(**state.values["sums"])
        if state.values["best"]:
            self.best = Evaluation.from_dict(state.values["best"])
        self.best_step = state.values["best_step"]
        self.best_weights = state.values.get("best_weights", RAW)
        self.gradient.load(self._weights())
        if self.budget is not None:
            self._restore_time(state)
        return state.values["history_lines"]

    def _restore_time(self, state: TrainState) -> None:
        """Continue with the plan of a state, or plan again for another total."""
        assert self.budget is not None
        if "timing" not in state.values:
            raise ValueError(f"the run in {self.output} began without a time")
        timing = self.timing = Timing(**state.values["timing"])
        self.optimiser.pace = Pace(**state.values["pace"])
        self.budget.spent_s = timing.spent_s
        if timing.total_s == self.budget.total_s:
            return
        if timing.spent_s >= self.budget.total_s:
            raise ValueError(
                f"the run in {self.output} has already taken {timing.spent_s / 60:.0f} minutes: "
                "--time must be longer"
            )
        timing.total_s = self.budget.total_s
        iters = self._affordable_iters(timing, evaluates_now=False)
        # As if the total had been known from the beginning, like --iters.
        self.optimiser.pace = Pace.of(iters, warmup=self.optimiser.pace.warmup)

    def finish(self, should_stop: Callable[[], bool]) -> TrainResult:
        """Do the remaining steps."""
        settings = self.settings
        if self.best is None:  # not if the run was stopped at step 0
            self._plan()
            self._evaluate()
            self._save()
        elif self.timing is not None and self.step < self.iters:
            self._announce(self.timing)
        while self.step < self.iters and not should_stop():
            self._do_step()
            self._plan()
            is_last = self.step == self.iters
            if is_last or self.step % settings.steps_per_report == 0:
                self._report()
            if is_last or self.step % settings.steps_per_eval == 0:
                self._evaluate()
            if is_last or self.step % settings.save_every == 0:
                self._save()
        is_finished = self.step >= self.iters
        if not is_finished and self.step % settings.save_every:
            self._save()
        return TrainResult(
            self.step, is_finished, self.best, self.best_step, best_weights=self.best_weights
        )

    @property
    def iters(self) -> int:
        """Number of steps, as last planned."""
        return self.optimiser.pace.iters if self.budget else self.settings.iters

    def _plan(self) -> None:
        """At the beginning and before each checkpoint, fit the number of steps to the time left.

        When the time is over between two checkpoints, this step is the last one.
        """
        if self.budget is None or self.timing is None or self.step == self.iters:
            return
        timing, pace, step = self.timing, self.optimiser.pace, self.step
        timing.spent_s = self.budget.spent()
        if step % self.settings.save_every == 0:
            timing.measure(step)
            iters = self._affordable_iters(
                timing, evaluates_now=step % self.settings.steps_per_eval == 0
            )
        elif timing.is_over:
            iters = step
        else:
            return
        if step == 0:
            self.optimiser.pace = Pace.of(iters, warmup=pace.warmup)
        else:
            self.optimiser.pace = pace.replanned(step, iters)
        progress = self.optimiser.pace.progress(step)
        record = {"step": step, "iters": iters, "progress": progress}
        self._write("plan", record | {"spent_s": timing.spent_s, "step_s": timing.step_s})
        self._announce(timing)

    def _announce(self, timing: Timing) -> None:
        """Report the number of steps and the time that they will take."""
        steps = self.iters - self.step
        num_evals = 1 + steps // self.settings.steps_per_eval
        left_s = steps * timing.step_s + num_evals * timing.eval_s
        self.on_event(Planned(step=self.step, iters=self.iters, left_s=left_s))

    def _affordable_iters(self, timing: Timing, *, evaluates_now: bool) -> int:
        """Number of steps of the whole run that the time and the texts allow."""
        assert self.budget is not None
        steps = timing.steps_left(
            steps_per_eval=self.settings.steps_per_eval, evaluates_now=evaluates_now
        )
        texts = self.budget.max_passes * len(self.data.train)
        limit = max(1, math.floor(texts / self.settings.batch_size))
        return max(self.step, 1, min(self.step + steps, limit))

    def _do_step(self) -> None:
        start = self.clock()
        settings = self.settings
        chosen = sequences_of_step(
            self.step,
            num_sequences=len(self.data.train),
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        result = self.gradient(
            self._weights(), self.data.train, chosen, step=self.step, workers=self.workers
        )
        gradients, self.grad_norm = self.optimiser.clip(self.form.gradients(result.gradients))
        if not (math.isfinite(result.loss) and math.isfinite(self.grad_norm)):
            name = "gradient" if math.isfinite(result.loss) else "loss"
            numbers = ", ".join(map(str, chosen))
            raise ValueError(
                f"the {name} of step {self.step + 1} is not finite, in training sequences "
                f"{numbers} (from 0); a lower learning rate may help"
            )
        self.optimiser.update(gradients)
        self.gradient.load(self._weights())
        self.step += 1
        seconds = self.clock() - start
        self.sums.add(result, seconds)
        self.on_event(Stepped(step=self.step, iters=self.iters, seconds=seconds))

    def _report(self) -> None:
        sums, self.sums = self.sums, _Sums()
        seconds = max(sums.seconds, 1e-9)
        report = Reported(
            step=self.step,
            loss=sums.loss / sums.steps,
            terms={name: value / sums.steps for name, value in sums.terms.items()},
            learning_rate=self.optimiser.learning_rate,
            grad_norm=self.grad_norm,
            tokens_per_s=sums.num_tokens / seconds,
            rows_per_s=sums.num_rows / seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )
        self._write("report", dataclasses.asdict(report) | {"seconds": seconds})
        self.on_event(report)

    def _evaluate(self) -> None:
        """Evaluate the raw and the averaged weights on the same texts; the better ones count.

        The next-token loss is constant with the gate, and computed once.
        """
        start, count = self.clock(), self.settings.val_batches
        chosen = self.data.held_out if count == -1 else self.data.held_out[:count]
        versions, results = self.optimiser.versions(), {}
        for name, parameters in versions.items():
            self.gradient.load(self.form.weights(parameters))
            results[name] = evaluate(
                self.model, chosen, rows_per_forward=self.settings.rows_per_forward
            )
        weights = max(results, key=lambda name: results[name].tokens_per_step)
        evaluation = results[weights]
        if self.next_token_loss is None or not self.settings.gate:
            self.gradient.load(self.form.weights(versions[weights]))
            self.next_token_loss = next_token_loss(self.model, chosen)
        is_best = self.best is None or evaluation.tokens_per_step > self.best.tokens_per_step
        if is_best:
            self.best, self.best_step, self.best_weights = evaluation, self.step, weights
            self._save_adapter(versions[weights])
        self.gradient.load(self._weights())
        event = Evaluated(
            step=self.step,
            evaluation=evaluation,
            next_token_loss=self.next_token_loss,
            is_best=is_best,
            weights=weights,
            results=results,
        )
        self._write("evaluation", event.to_dict())
        if self.timing is not None:
            self.timing.add_evaluation(self.clock() - start)
        self.on_event(event)

    def _save_adapter(self, parameters: Parameters) -> None:
        """Write the adapter, unless it was trained without the gate, which decoding always has."""
        config = self.model.adapter_config
        assert config is not None and self.best is not None
        if self.settings.gate:
            config = dataclasses.replace(config, acceptance=self.best.monotonic_acceptance())
            statistics = self.best.statistics("held-out text of the training run", self.vocabulary)
            tensors = adapter_tensors(parameters)
            save_adapter(self.output, config, tensors, statistics=statistics)

    def _save(self) -> None:
        assert self.history is not None
        tensors = self.optimiser.tensors()
        values = {
            "identity": self._identity(),
            "sums": dataclasses.asdict(self.sums),
            "best": self.best and self.best.to_dict(),
            "best_step": self.best_step,
            "best_weights": self.best_weights,
            "history_lines": len(self.history),
        }
        if self.budget is not None and self.timing is not None:
            self.timing.spent_s = self.budget.spent()
            values["timing"] = dataclasses.asdict(self.timing)
            values["pace"] = dataclasses.asdict(self.optimiser.pace)
        path = save_state(self.folder, TrainState(step=self.step, tensors=tensors, values=values))
        self.on_event(Saved(step=self.step, path=path))

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        assert self.history is not None
        self.history.append({"kind": kind} | values)

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        assert self.model.adapter_config is not None
        settings = self.settings.to_dict()
        return {
            "base_fingerprint": self.model.adapter_config.base_fingerprint,
            "data_hash": self.data.data_hash,
            "processes": self.processes,
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


def peak_memory_bytes() -> int:
    """Peak memory so far: MLX's count on a GPU, that of the process on a CPU."""
    if mx.default_device().type != mx.cpu:
        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
