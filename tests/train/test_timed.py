"""``mlx-mtp train --time``: what it prints, what it decides, what it refuses, and resuming."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.train import timed
from mlx_mtp.train.data.records import RecordWriter, read_jsonl
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.workers import WorkerSpec
from mlx_mtp.train.measure import measure
from mlx_mtp.train.recipe import Rates
from mlx_mtp.train.settings import DataSettings, TrainSettings
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import save_tiny_model
from tests.train.kill_script import (
    SMALL,
    ScriptedLoop,
    done,
    failure,
    invoke,
    loop,
    write_chats,
)
from tests.train.test_distil import readable

__all__ = ["loop"]

# About four records, and eight uses of one in training steps, per second.
RATES = Rates(text_tps=250.0, rows_per_s=1600.0, eval_text_s=0.01)


@dataclass
class Clock:
    """Time that the test sets."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that does not move, and rates that were measured in no time."""
    clock = Clock()
    monkeypatch.setattr(timed, "CLOCK", clock)
    monkeypatch.setattr(timed, "measure", lambda *args, **options: RATES)
    return clock


def saved(out: Path, name: str) -> dict:
    return json.loads((out / "training" / name).read_text())


def test_a_time_is_all_that_is_needed(tmp_path: Path, loop: ScriptedLoop, clock: Clock) -> None:
    out, before = tmp_path / "out", time.time()
    limits = ("--max-prompt-tokens", "40", "--max-answer-tokens", "20", "--distil-batch-size", "32")
    result = done("--adapter-path", str(out), "--time", "30s", *limits)
    call = loop.calls[0]
    recipe = saved(out, "recipe.json")["recipe"]
    assert len(read_jsonl(out / "training" / "data.jsonl")) == recipe["num_records"] > 40
    settings = call.settings
    assert settings.learning_rate == 8e-4 and settings.min_learning_rate == 0.02
    assert settings.iters == recipe["settings"]["iters"] >= 100
    assert settings.num_anchors == 40 and settings.drop_late == 0.2
    assert call.budget.total_s == pytest.approx(29.4) and call.workers.settings == settings
    lines = result.stderr.splitlines()
    assert lines[0].startswith("memory for ")
    assert lines[1] == (
        "Measured per second: 250 tokens of text, 1600 mask rows of training; "
        f"{recipe['eval_s']:.1f} s per evaluation"
    )
    assert f"generate {recipe['num_records']} texts (" in lines[2]
    assert f"train {settings.iters} steps of {settings.batch_size} texts x 40 anchors" in lines[2]
    when = re.fullmatch(r"Done at about (\d\d:\d\d)", lines[3])
    assert when is not None
    ends = (before + seconds for seconds in range(0, 60, 5))
    assert when[1] in {time.strftime("%H:%M", time.localtime(end)) for end in ends}


def test_given_options_win(tmp_path: Path, loop: ScriptedLoop, clock: Clock) -> None:
    out = tmp_path / "out"
    done("--adapter-path", str(out), "--time", "1m", *SMALL, "--batch-size", "3",
         "--learning-rate", "1e-4", "--save-every", "7", "--num-anchors", "9")  # fmt: skip
    settings = loop.calls[0].settings
    assert (settings.batch_size, settings.learning_rate) == (3, 1e-4)
    assert (settings.save_every, settings.num_anchors) == (7, 9)
    assert len(read_jsonl(out / "training" / "data.jsonl")) == 8


def test_a_time_may_stand_in_a_file(tmp_path: Path, loop: ScriptedLoop, clock: Clock) -> None:
    file, data = tmp_path / "run.yaml", write_chats(tmp_path / "chats.jsonl")
    file.write_text(f"time: 1m\ndata: {data}\ndata-as-is: true\nadapter_path: {tmp_path / 'out'}\n")
    done("-c", str(file))
    assert loop.calls[0].budget.total_s == pytest.approx(58.8)
    file.write_text("time: 90\nadapter_path: out\n")
    assert f"{file}: time: '90' is not a time such as 30m" in failure("-c", str(file))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--time", "soon"), "'soon' is not a time such as 30m, 2h, 1h30m or overnight"),
        (("--time", "0m"), "'0m' is not a time"),
        (("--time", "2h", "--iters", "5"), "--iters cannot be used with --time"),
    ],
)
def test_bad_times_are_named(
    tmp_path: Path, loop: ScriptedLoop, words: tuple[str, ...], reason: str
) -> None:
    result = invoke("--adapter-path", str(tmp_path / "out"), *words)
    assert result.exit_code == 2 and reason in result.stderr
    assert not (tmp_path / "out").exists() and not loop.loaded


def test_a_time_that_is_too_short_names_one_that_is_not(
    tmp_path: Path, loop: ScriptedLoop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Rates(text_tps=2.0, rows_per_s=20.0, eval_text_s=3.0)
    monkeypatch.setattr(timed, "measure", lambda *args, **options: slow)
    out = str(tmp_path / "out")
    limits = ("--max-answer-tokens", "20", "--max-prompt-tokens", "40")
    line = failure("--adapter-path", out, "--time", "10m", *limits)
    assert "--time 10m is too short for tiny on this machine: at least " in line
    found = re.search(r"at least (?:(\d+) h )?(\d+) min are needed", line)
    assert found is not None and not Path(out).exists()
    monkeypatch.setattr("mlx_mtp.train.command.make_records", lambda *args, **options: stop())

    def stop() -> None:
        raise ValueError("text is generated")

    minutes = 60 * int(found[1] or 0) + int(found[2])
    line = failure("--adapter-path", out, "--time", f"{minutes}m", *limits)
    assert "text is generated" in line


def test_text_ends_when_its_time_is_over(
    tmp_path: Path, loop: ScriptedLoop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordWriter.append

    def slow(writer: RecordWriter, record: object) -> None:
        append(writer, record)  # type: ignore
        clock.now += 2.0

    monkeypatch.setattr(RecordWriter, "append", slow)
    monkeypatch.setattr(timed, "MIN_RECORDS", 6)
    out = tmp_path / "out"
    limits = ("--max-prompt-tokens", "40", "--max-answer-tokens", "20", "--distil-batch-size", "32")
    result = done("--adapter-path", str(out), "--time", "60s", *limits)
    plan = saved(out, "recipe.json")
    count = len(read_jsonl(out / "training" / "data.jsonl"))
    assert count == -(-plan["text_until_s"] // 2.0) == plan["recipe"]["num_records"]
    assert f"The time for text is over with {count} records" in result.stderr
    assert loop.calls[0].budget.spent() == 2.0 * count
    done("--adapter-path", str(out), "--resume")
    first, second = loop.calls
    assert first.data.train == second.data.train and first.settings == second.settings


def test_stopping_and_resuming_keeps_the_time(
    tmp_path: Path, loop: ScriptedLoop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordWriter.append

    def press(writer: RecordWriter, record: object) -> None:
        append(writer, record)  # type: ignore
        clock.now += 0.25
        if len(writer.records) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RecordWriter, "append", press)
    out = tmp_path / "out"
    result = invoke("--adapter-path", str(out), "--time", "60s", *SMALL)
    assert result.exit_code == 130 and saved(out, "spent.json") == {"seconds": 1.0, "records": 4}
    clock.now += 500  # does not count
    monkeypatch.setattr(timed, "measure", lambda *args, **options: pytest.fail("measured again"))
    result = done("--adapter-path", str(out), "--resume")
    assert "59 s left, done at about " in result.stderr
    assert loop.calls[0].budget.total_s == pytest.approx(58.8)
    assert loop.calls[0].budget.spent() == pytest.approx(1.0 + 3 * 0.25)


def test_another_time_when_resuming_is_a_new_total(
    tmp_path: Path, loop: ScriptedLoop, clock: Clock
) -> None:
    out = tmp_path / "out"
    done("--adapter-path", str(out), "--time", "60s", *SMALL)
    done("--adapter-path", str(out), "--resume", "--time", "120s")
    first, second = loop.calls
    assert second.budget.total_s == 2 * first.budget.total_s
    assert second.data.train == first.data.train
    assert second.settings == first.settings


def test_runs_with_and_without_a_time_do_not_mix(
    tmp_path: Path, loop: ScriptedLoop, clock: Clock
) -> None:
    timed_out, plain = str(tmp_path / "timed"), str(tmp_path / "plain")
    done("--adapter-path", timed_out, "--time", "60s", *SMALL)
    refused = failure("--adapter-path", timed_out, "--resume", "--iters", "9")
    assert "--iters cannot be used with --time" in refused
    done("--adapter-path", plain, "--iters", "2", *SMALL)
    refused = failure("--adapter-path", plain, "--resume", "--time", "1h")
    assert f"--time is not for the run in {plain}, which began without it" in refused


def test_rates_are_measured_and_the_model_is_not_changed(tmp_path: Path) -> None:
    settings = TrainSettings(num_draft_tokens=3, rank=4, workers=1, rows_per_forward=32)
    model = new_adapter(readable(), settings)
    data = DataSettings(max_prompt_tokens=40, max_answer_tokens=20, batch_size=4)
    task = timed.task_of(model, byte_tokenizer(), data, [], settings, starts_trained=False)
    assert task.generated_tokens == (40 + 11) / 0.8 and task.num_records is None
    before = {name: mx.array(value) for name, value in trainable(model).items()}
    started = time.perf_counter()
    rates = measure(
        model, byte_tokenizer(), task=task, source=[], data=data, seconds=0.5,
        spec=WorkerSpec(model=None, settings=settings),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert min(rates.text_tps, rates.rows_per_s, rates.eval_text_s) > 0
    assert 0.4 < seconds < 30 and rates.eval_text_s < 2 * seconds
    after = trainable(model)
    assert all(mx.array_equal(value, after[name]) for name, value in before.items())


def test_lengths_of_given_texts_are_theirs(tmp_path: Path) -> None:
    from mlx_mtp.train.data.sources import read_data

    settings = TrainSettings()
    records = read_data(str(write_chats(tmp_path / "chats.jsonl")))
    data = DataSettings(data="chats.jsonl", as_is=True)
    model = readable()
    task = timed.task_of(model, byte_tokenizer(), data, records, settings, starts_trained=True)
    assert (task.num_records, task.generated_tokens, task.starts_trained) == (12, 0.0, True)
    assert 40 < task.answer_tokens < 60
    data = DataSettings(data="chats.jsonl")
    task = timed.task_of(model, byte_tokenizer(), data, records, settings, starts_trained=False)
    assert (task.num_records, task.max_records) == (None, 12) and task.generated_tokens > 0


@pytest.mark.slow
def test_a_tiny_model_is_trained_for_some_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is the processor time of this process, which other work does not change."""
    monkeypatch.setattr(timed, "CLOCK", time.process_time)
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    data = str(write_chats(tmp_path / "chats.jsonl"))
    words = ("--model", str(model), "--data", data, "--data-as-is", "--batch-size", "1",
             "--num-anchors", "4", "--num-draft-tokens", "3", "--rank", "4",
             "--workers", "1")  # fmt: skip
    started = timed.CLOCK()
    result = done("--adapter-path", str(out), *words, "--time", "20s")
    assert "Measured per second: " in result.stderr and "done at about" in result.stderr
    assert timed.CLOCK() - started < 40
    history = [json.loads(line) for line in (out / "training/history.jsonl").open()]
    assert history[0]["kind"] == "plan" and history[-1]["kind"] == "evaluation"
    assert history[-1]["step"] <= 3 * 12
    done("--adapter-path", str(out), "--resume")  # nothing is left to do
