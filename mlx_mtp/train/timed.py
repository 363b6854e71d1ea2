"""A run with a time: its rates are measured, its recipe is chosen, and its time is kept.

``training/recipe.json`` has the rates and the recipe, so that a resumed run does not measure again
and keeps the same settings.  ``training/spent.json`` has the seconds spent until the newest record
of the text; from the first checkpoint on, the states have them.  Work that is lost when a run is
killed does not count, and neither does the time while it is stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.train.data.distil_run import BEGINNING_TOKENS
from mlx_mtp.train.data.pipeline import TEMPLATE_TOKENS
from mlx_mtp.train.data.records import Record
from mlx_mtp.train.data.sequences import encode
from mlx_mtp.train.gradient.workers import WorkerSpec
from mlx_mtp.train.measure import measure
from mlx_mtp.train.pace import Budget
from mlx_mtp.train.recipe import (
    MAX_PASSES,
    MAX_RECORDS,
    MIN_RECORDS,
    RESERVE,
    TEXT_SLACK,
    Rates,
    Recipe,
    Task,
    TooShort,
    choose,
    measuring_s,
)
from mlx_mtp.train.run.display import clock_time, duration
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.settings import DataSettings, TrainSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

CLOCK: Callable[[], float] = time.monotonic
# Before there is any text: tokens of a prompt that the model writes, the part of its maximum that
# an answer has, and the part of the generated tokens that is kept, all from docs/shipped-adapter.
_PROMPT_TOKENS, _ANSWER_PART, _KEPT_PART = 40, 0.55, 0.8
_SAMPLE = 64  # records whose lengths are taken


class TextTimeIsUp(Exception):
    """The time for generating text is over."""


@dataclass(kw_only=True)
class TimedRun:
    """The recipe of a run and the time that it has spent.

    Attributes:
        folder: of the run.
        total_s: seconds of the whole run.
        rates: measured when the run began.
        task: what is trained.
        recipe: what the run does.
        text_until_s: seconds spent when the text must be complete.
        spent_s: seconds spent before this process.
        began: value of ``CLOCK`` when this process began.
        num_saved: records whose time is saved.
    """

    folder: RunFolder
    total_s: float
    rates: Rates
    task: Task
    recipe: Recipe
    text_until_s: float
    spent_s: float
    began: float
    num_saved: int = 0

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.total_s - self._spent()

    def on_text(self, num_records: int) -> None:
        """Save the time spent on new records.

        Raises:
            TextTimeIsUp: the rest of the time is for training.
        """
        if num_records > self.num_saved:
            self.num_saved = num_records
            self.save_spent()
        if num_records >= MIN_RECORDS and self._spent() >= self.text_until_s:
            raise TextTimeIsUp

    def end_text(self, num_records: int) -> None:
        """Save that the text has only so many records."""
        self.recipe = dataclasses.replace(self.recipe, num_records=num_records)
        self.save()

    def budget(self) -> Budget:
        """The time of the training loop."""
        return Budget(
            total_s=(1 - RESERVE) * self.total_s,
            step_s=self.recipe.step_s,
            eval_s=self.recipe.eval_s,
            max_passes=MAX_PASSES,
            spent_s=self.spent_s,
            clock=CLOCK,
            began=self.began,
        )

    def save(self) -> None:
        """Write the recipe."""
        values = {
            "total_s": self.total_s,
            "text_until_s": self.text_until_s,
            "rates": dataclasses.asdict(self.rates),
            "task": dataclasses.asdict(self.task),
            "recipe": dataclasses.asdict(self.recipe),
        }
        write_atomically(self.folder.recipe, json.dumps(values, indent=2) + "\n")

    def save_spent(self) -> None:
        """Write the time spent on the text so far."""
        values = {"seconds": self._spent(), "records": self.num_saved}
        write_atomically(self.folder.spent, json.dumps(values) + "\n")

    def lines(self) -> list[str]:
        """What the run will do, and when it will be done."""
        recipe, settings = self.recipe, self.recipe.settings
        text = f"{self.rates.text_tps:.0f} tokens of text, " if self.task.generated_tokens else ""
        lines = [
            f"Measured per second: {text}{self.rates.rows_per_s:.0f} mask rows of training; "
            f"{recipe.eval_s:.1f} s per evaluation"
        ]
        parts = []
        if recipe.generate_s:
            parts.append(f"generate {recipe.num_records} texts ({duration(recipe.generate_s)})")
        steps = f"train {settings['iters']} steps"
        if "batch_size" in settings and "num_anchors" in settings:
            steps += f" of {settings['batch_size']} texts x {settings['num_anchors']} anchors"
        parts.append(f"{steps} ({duration(recipe.train_s)}, {recipe.passes:.1f} passes)")
        parts.append(f"evaluations ({duration(recipe.evaluate_s)})")
        lines.append(f"Recipe for {duration(self.total_s)}: {', '.join(parts)}")
        if "learning_rate" in settings:
            lines[-1] += f"; peak learning rate {settings['learning_rate']:.1e}"
        return [*lines, f"Done at about {clock_time(recipe.seconds)}"]

    def resume_line(self) -> str:
        """How much time is left, while there is no checkpoint."""
        return f"{duration(self.left_s)} left, done at about {clock_time(self.left_s)}"

    def _spent(self) -> float:
        return self.spent_s + CLOCK() - self.began


def begin(
    folder: RunFolder,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    *,
    time_text: str,
    total_s: float,
    began: float,
    data: DataSettings,
    source: Sequence[Record],
    user: Mapping[str, Any],
    spec: WorkerSpec,
) -> TimedRun:
    """Measure the rates and choose the recipe of a new run.

    Args:
        folder: of the run, locked.
        model: with its new adapter.
        tokenizer: of the model.
        time_text: the time as the user wrote it.
        total_s: the same in seconds.
        began: value of ``CLOCK`` when the process began.
        data: settings of the text.
        source: the user's data, if any.
        user: values of ``TrainSettings`` that the user has set.
        spec: how other processes load the model, and the settings.

    Raises:
        ValueError: the time is too short.
        OSError: a file cannot be written.
    """
    task = task_of(model, tokenizer, data, source, spec.settings, starts_trained=bool(spec.start))
    rates = measure(
        model,
        tokenizer,
        task=task,
        source=source,
        data=data,
        spec=spec,
        seconds=measuring_s(total_s),
        clock=CLOCK,
    )
    return _chosen(folder, rates, task, user, time_text, total_s, 0.0, began, name=model.name)


def resume(
    folder: RunFolder,
    model: MTPModel,
    *,
    time_text: str,
    total_s: float,
    began: float,
    user: Mapping[str, Any],
    may_change: bool,
) -> TimedRun:
    """Read the recipe of a run; other arguments are those of ``begin``.

    Args:
        may_change: whether the recipe may be chosen again for another time, because the text is
            not complete.

    Raises:
        ValueError: the files are damaged, or the new time is too short.
    """
    values = _read(folder.recipe)
    spent = _read(folder.spent)
    try:
        rates, task = Rates(**values["rates"]), Task(**values["task"])
        recipe, spent_s = Recipe(**values["recipe"]), float(spent["seconds"])
        num_saved = int(spent["records"])
        text_until_s, old_s = float(values["text_until_s"]), float(values["total_s"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder.recipe} or {folder.spent.name} is damaged") from None
    if total_s != old_s and may_change:
        run = _chosen(
            folder, rates, task, user, time_text, total_s, spent_s, began, name=model.name
        )
        run.num_saved = num_saved
        return run
    return TimedRun(
        folder=folder,
        total_s=total_s,
        rates=rates,
        task=task,
        recipe=recipe,
        text_until_s=text_until_s,
        spent_s=spent_s,
        began=began,
        num_saved=num_saved,
    )


def _chosen(
    folder: RunFolder,
    rates: Rates,
    task: Task,
    user: Mapping[str, Any],
    time_text: str,
    total_s: float,
    spent_s: float,
    began: float,
    *,
    name: str,
) -> TimedRun:
    before_s = CLOCK() - began if not spent_s else 0.0  # of a new run: loading and measuring
    try:
        recipe = choose(total_s - before_s, rates, task, user)
    except TooShort as error:
        needed = duration(error.needed_s + before_s + 60)
        raise ValueError(
            f"--time {time_text} is too short for {name} on this machine: at least {needed} are "
            "needed"
        ) from None
    return TimedRun(
        folder=folder,
        total_s=total_s,
        rates=rates,
        task=task,
        recipe=recipe,
        text_until_s=before_s + TEXT_SLACK * recipe.generate_s,
        spent_s=spent_s,
        began=began,
    )


def task_of(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    data: DataSettings,
    source: Sequence[Record],
    settings: TrainSettings,
    *,
    starts_trained: bool,
) -> Task:
    """What is to be trained, with the lengths of texts that do not exist yet."""
    prompt_limit, answer_limit = data.token_limits(model)
    answer, prompt = _ANSWER_PART * answer_limit, float(min(prompt_limit, _PROMPT_TOKENS))
    lengths: dict[str, Any] = {}
    if data.method == "distil":
        if not tokenizer.has_chat_template:
            prompt = float(BEGINNING_TOKENS)
        lengths["generated_tokens"] = (prompt + answer) / _KEPT_PART
        lengths["num_records"] = data.num_records
        lengths["max_records"] = MAX_RECORDS
    else:
        step = max(1, len(source) // _SAMPLE)
        sample: list[TokenSequence] = []
        for record in source[::step]:
            with contextlib.suppress(ValueError):  # records that the template refuses are dropped
                sample.append(encode(record, tokenizer, max_seq_length=settings.max_seq_length))
        mean = sum(len(sequence.ids) for sequence in sample) / max(1, len(sample))
        lengths["max_records"] = len(source)
        if data.as_is:
            answer = sum(sequence.num_answer_tokens for sequence in sample) / max(1, len(sample))
            prompt = max(0.0, mean - answer - TEMPLATE_TOKENS)
            lengths |= {"generated_tokens": 0.0, "num_records": len(source)}
        else:
            prompt = min(prompt_limit, mean / 2)
            lengths["generated_tokens"] = answer
            lengths["num_records"] = None if data.num_records is None else len(source)
    length = min(answer + prompt + TEMPLATE_TOKENS, float(settings.max_seq_length))
    return Task(
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        answer_tokens=answer,
        sequence_tokens=length,
        held_out=data.held_out,
        starts_trained=starts_trained,
        versions=1 + bool(settings.ema),
        on_cpu=mx.default_device().type == mx.cpu,
        **lengths,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return dict(values)
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{path} is missing or damaged") from None
