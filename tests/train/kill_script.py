"""A scripted training loop for the tests of ``mlx-mtp train``; the model writes random letters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from mlx_mtp.cli.main import cli
from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.model.config import CONFIG_FILE
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.workers import WorkerSpec
from mlx_mtp.train.loop import TrainData, TrainResult
from mlx_mtp.train.pace import Budget
from mlx_mtp.train.run.checkpoint import TrainState, save_state
from mlx_mtp.train.run.events import Evaluated, Reported, Saved, Stepped
from mlx_mtp.train.run.history import History
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.train.test_distil import readable

SMALL = ("--num-records", "8", "--max-prompt-tokens", "40", "--max-answer-tokens", "20",
         "--distil-batch-size", "4", "--held-out", "0.3")  # fmt: skip


def evaluation(tokens_per_step: float) -> Evaluation:
    return Evaluation(
        tokens_per_step=tokens_per_step,
        acceptance=(0.75, 0.5),
        num_tokens=120,
        num_steps=60,
        num_sequences=3,
    )


@dataclass
class ScriptedLoop:
    """Stands in for ``loop.train``: writes what it would write, and learns nothing.

    Attributes:
        template: the tokenizer's chat template; the empty one is none.
        before: called with the number of every step before it.
        calls: the arguments of every call.
    """

    template: bool = True
    before: Callable[[int], None] = lambda step: None
    calls: list[SimpleNamespace] = field(default_factory=list)
    loaded: list[Any] = field(default_factory=list)

    def load(self, name: str | None, **options: Any) -> tuple[MTPModel, Any]:
        self.loaded.append((name, options))
        return readable(), byte_tokenizer() if self.template else byte_tokenizer(template=None)

    def train(
        self,
        model: MTPModel,
        data: TrainData,
        settings: Any,
        output: Path,
        *,
        resume: bool = False,
        budget: Budget | None = None,
        workers: WorkerSpec,
        on_event: Callable[[Any], None],
        should_stop: Callable[[], bool],
    ) -> TrainResult:
        assert workers.settings == settings
        self.calls.append(
            SimpleNamespace(
                data=data, settings=settings, resume=resume, budget=budget, workers=workers
            )
        )
        training = output / "training"
        states = sorted(training.glob("state-*"))
        first = int(states[-1].name.removeprefix("state-")) if resume else 0
        step = first
        with History(training / "history.jsonl", keep=None if resume else 0) as history:
            for step in range(first + 1, settings.iters + 1):
                if should_stop():
                    break
                self.before(step)
                self._step(step, settings, history, on_event)
                path = save_state(training, TrainState(step=step, tensors={}, values={}))
                on_event(Saved(step=step, path=path))
            else:
                step = settings.iters + 1
        done = step - 1
        (output / CONFIG_FILE).write_text("{}")
        best = evaluation(1.0 + done / 10) if done else None
        return TrainResult(step=done, finished=done == settings.iters, best=best, best_step=done)

    def _step(self, step: int, settings: Any, history: History, on_event: Any) -> None:
        values: dict[str, Any] = {"step": step, "loss": 5.0 / step, "terms": {"base": 2.0 / step}}
        values |= {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_s": 210.0}
        values |= {"rows_per_s": 50.0, "peak_memory_bytes": 10**8}
        on_event(Stepped(step=step, iters=settings.iters, seconds=0.5))
        on_event(Reported(**values))
        history.append({"kind": "report", **values, "seconds": 0.5})
        found = evaluation(1.0 + step / 10)
        on_event(Evaluated(step=step, evaluation=found, next_token_loss=2.0, is_best=True))
        shown = {**found.to_dict(), "next_token_loss": 2.0}
        history.append({"kind": "evaluation", "step": step, **shown})


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> ScriptedLoop:
    """Let the command load the letter model and train by the script, without pictures."""
    scripted = ScriptedLoop()
    monkeypatch.setattr("mlx_mtp.train.command.load", scripted.load)
    monkeypatch.setattr("mlx_mtp.train.command.run_loop", scripted.train)
    monkeypatch.setattr("mlx_mtp.train.command.new_adapter", lambda model, *args, **kw: model)
    monkeypatch.setattr("mlx_mtp.train.command.estimate", FakeEstimate)
    monkeypatch.setattr("mlx_mtp.train.run.summary.draw_curves", lambda *_: None)
    return scripted


class FakeEstimate:
    """Stands in for ``memory.estimate``; too much for sequences of 999 ids."""

    def __init__(self, model: MTPModel, settings: Any, *, longest: int) -> None:
        self.longest = longest

    def lines(self) -> list[str]:
        return [f"memory for {self.longest} tokens"]

    def check(self) -> None:
        if self.longest == 999:
            raise ValueError("it does not fit: lower --max-seq-length")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["train", *args])


def done(*args: str) -> Result:
    """Run a command that must succeed."""
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result


def failure(*args: str) -> str:
    """Run a command that must fail politely; return its line, the last on stderr."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ") and result.stderr.count("Error:") == 1, result.stderr
    return line


def write_chats(path: Path, count: int = 12) -> Path:
    """Write different conversations of a user with a person."""
    lines = []
    for number in range(count):
        asked = f"Question {number}: what is {number * 7} plus {number * number}?"
        answered = f"That is {number * 7 + number * number}, I have counted it on my fingers."
        pair = [("user", asked), ("assistant", answered)]
        lines.append({"messages": [{"role": role, "content": text} for role, text in pair]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arrays(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file."""
    found = mx.load(str(path))
    assert isinstance(found, dict)
    return found
