"""From nothing, or from a user's data, to sequences; and the folder of a run."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.data.pipeline import (
    expected_length,
    make_records,
    prepare,
    read_source,
    room_for,
    saved_records,
)
from mlx_mtp.train.data.prompts import draw_prompt
from mlx_mtp.train.data.records import Record, data_hash
from mlx_mtp.train.data.topics import read_topics
from mlx_mtp.train.loop import TrainResult
from mlx_mtp.train.run.display import (
    Display,
    data_line,
    duration,
    evaluation_line,
    step_line,
)
from mlx_mtp.train.run.events import Evaluated, Reported, Stepped
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.run.summary import recipe_of, summary_lines, tracked_values
from mlx_mtp.train.settings import DataSettings
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.train.test_distil import readable

SMALL: dict[str, Any] = {"max_prompt_tokens": 40, "max_answer_tokens": 20, "batch_size": 4}


def make(path: Path, *, template: bool = True, told: list[str] | None = None, **options: Any):
    settings = DataSettings(**{**({} if "data" in options else SMALL), **options})
    tokenizer = byte_tokenizer() if template else byte_tokenizer(template=None)
    source = read_source(settings, output=path.parent / "out")
    log = None if told is None else told.append
    return make_records(readable(), tokenizer, source, path, settings, log=log)


def test_without_data_the_model_answers_constructed_messages(tmp_path):
    records = make(tmp_path / "data.jsonl", num_records=5)
    assert len(records) == 5
    for record in records:
        prompt = draw_prompt(0, record.meta["number"])
        assert record.meta["kind"] == prompt.kind
        assert record.prompt.startswith(prompt.first.strip())
        assert record.prompt == prompt.first or not prompt.is_complete
    kept = saved_records(
        tmp_path / "data.jsonl", DataSettings(num_records=5), data_sha256=data_hash(records)
    )
    assert kept == records
    with pytest.raises(ValueError, match=r"data\.jsonl was changed since the run began"):
        saved_records(tmp_path / "data.jsonl", DataSettings(num_records=4),
                     data_sha256=data_hash(records))  # fmt: skip
    with pytest.raises(ValueError, match="is missing"):
        saved_records(tmp_path / "no.jsonl", DataSettings(), data_sha256="")


def test_a_model_without_a_template_writes_plain_text_and_says_so(tmp_path):
    told: list[str] = []
    records = make(tmp_path / "data.jsonl", template=False, told=told, num_records=3)
    assert told[0] == "tiny has no chat template: it continues plain text instead"
    assert all(record.text for record in records)


def write_chats(path: Path, count: int = 6) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"Question {number}, please {'why' * number}"},
                      {"role": "assistant", "content": f"The answer of a person, {number}"}]}
        for number in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_users_data_are_answered_by_the_model_unless_taken_as_they_are(tmp_path):
    data = str(write_chats(tmp_path / "chats.jsonl"))
    limits: dict[str, Any] = {"max_prompt_tokens": 60, "max_answer_tokens": 20}
    own = make(tmp_path / "own.jsonl", data=data, **limits)
    theirs = make(tmp_path / "theirs.jsonl", data=data, as_is=True)
    assert {each.prompt for each in own} == {each.prompt for each in theirs}
    assert all("of a person" in each.answers[0] for each in theirs)
    assert not any("of a person" in each.answers[0] for each in own)
    assert not (tmp_path / "theirs.jsonl").exists()
    fewer = make(tmp_path / "few.jsonl", data=data, as_is=True, num_records=3, seed=1)
    assert len(fewer) == 3 and set(map(repr, fewer)) < set(map(repr, theirs))


def test_what_cannot_be_trained_on_is_named(tmp_path):
    told: list[str] = []
    loop = "again and " * 200
    lines = [{"text": "words enough to learn from"}, {"text": loop}, {"text": loop + "once"}]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert len(make(tmp_path / "x.jsonl", data=str(path), as_is=True, told=told)) == 1
    assert told == ["1 records dropped: 1 loop"]
    path.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ValueError, match=r"no record can .*\(dropped: 1 loop\)"):
        make(tmp_path / "x.jsonl", data=str(path), as_is=True)
    chats = write_chats(tmp_path / "chats.jsonl")
    make(tmp_path / "x.jsonl", data=str(chats), as_is=True, template=False, told=told)
    assert told[-1] == "tiny has no chat template: conversations become plain text"


def test_sequences_are_divided_and_told(tmp_path):
    records = [Record(text=f"{number} text number {number} of them") for number in range(30)]
    prepared = prepare(records, byte_tokenizer(), max_seq_length=22, held_out=0.2)
    assert len(prepared.train) + len(prepared.held_out) == 30 and prepared.longest == 22
    assert prepared.data_hash == data_hash(records)
    assert "30 sequences were longer than the context and were truncated" in prepared.lines
    assert prepared.lines[-1].endswith("of the sequences are held out for evaluation")
    with pytest.raises(ValueError, match="too little data: 1 usable"):
        prepare(records[:1], byte_tokenizer(), max_seq_length=22, held_out=0.2)


def test_texts_of_benchmarks_are_left_out_and_counted():
    records = [Record(text=f"{number} text number {number} of them") for number in range(30)]
    stolen = Record(text=f"As they say: {builtin_prompts()[0].text}")
    options: dict[str, Any] = {"max_seq_length": 99, "held_out": 0.2}
    prepared = prepare([*records, stolen], byte_tokenizer(), **options)
    clean = prepare(records, byte_tokenizer(), **options)
    assert [each.ids for each in prepared.train] == [each.ids for each in clean.train]
    assert prepared.data_hash == data_hash([*records, stolen]) != clean.data_hash
    assert prepared.contamination is not None
    assert str(prepared.contamination) in prepared.lines
    assert prepared.contamination.counts == {"builtin": 1}
    former = prepare([*records, stolen], byte_tokenizer(), compare_with=None, **options)
    assert former.contamination is None
    assert len(former.train) + len(former.held_out) == 31


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data": " "}, "data is empty"),
        ({"as_is": True}, "--data-as-is needs --data"),
        ({"topics": ("a",), "data": "x"}, "--topics cannot be used with --data"),
        ({"held_out": 0.0}, "held_out must be above 0 and below 1, got 0.0"),
        ({"num_records": 0}, "num_records must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        DataSettings(**options)


def test_lengths_fit_the_context():
    small, usual = readable(max_position_embeddings=100), readable()
    assert DataSettings().token_limits(usual) == (256, 512)
    assert sum(DataSettings().token_limits(small)) <= 100
    assert DataSettings(max_answer_tokens=80).token_limits(small) == (20, 80)
    assert DataSettings(max_prompt_tokens=30).token_limits(small) == (30, 70)
    assert room_for(small, 2048, 8) == 92 and room_for(usual, 2048, 8) == 2048
    with pytest.raises(ValueError, match="tiny takes at most 100 positions, too few for 60 mask"):
        room_for(small, 2048, 60)
    assert expected_length(usual, DataSettings(), max_seq_length=2048) == 256 + 512 + 64
    assert expected_length(usual, DataSettings(data="x", as_is=True), max_seq_length=99) == 99


def test_the_adapters_folder_may_not_lie_in_the_data(tmp_path):
    (tmp_path / "data.txt").write_text("words")
    settings = DataSettings(data=str(tmp_path))
    with pytest.raises(ValueError, match="is inside the data's folder"):
        read_source(settings, output=tmp_path / "deep" / "out")


def test_topics_are_read_a_line_each(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("rivers\n\n Fix this:\\n... \n", encoding="utf-8")
    assert read_topics(path) == ("rivers", "Fix this:\n...")
    path.write_text("\n")
    with pytest.raises(ValueError, match="contains no topics"):
        read_topics(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_topics(path)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    out = tmp_path / "my out"
    folder = RunFolder(out)
    folder.check_new()
    with pytest.raises(ValueError, match="contains no training run to resume"):
        folder.check_begun()
    out.write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        folder.check_new()
    out.unlink()
    out.mkdir()
    folder.check_new()
    (out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"is not empty \(it contains thesis\.tex\)"):
        folder.check_new()
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an adapter: .* --resume-adapter-file '.*my out'"):
        folder.check_new()
    (out / "training" / "state-0000120").mkdir(parents=True)
    (out / "training" / "state-0000090").mkdir()
    with pytest.raises(ValueError, match="Resume it with: mlx-mtp train .* --resume; or"):
        folder.check_new()
    folder.check_begun()
    assert folder.newest_step() == 120


def test_a_run_that_kept_nothing_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "a" / "out")
    with pytest.raises(ValueError, match="no"), folder.locked():
        folder.write_command({"options": {"rank": 3}})
        folder.data.touch()
        assert folder.read_command()["options"] == {"rank": 3}
        raise ValueError("no")
    assert not folder.path.exists()
    with folder.locked():
        folder.data.write_text("{}\n")
        with (
            pytest.raises(ValueError, match="written by another process"),
            folder.locked(),
        ):
            pass
    assert folder.data.exists()
    (folder.training / "command.json").write_text("[]")
    with pytest.raises(ValueError, match=r"command\.json is damaged"):
        folder.read_command()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


EVALUATION = Evaluation(
    tokens_per_step=2.5, acceptance=(0.8, 0.5), num_tokens=100, num_steps=40, num_sequences=3
)
REPORT = Reported(
    step=10,
    loss=5.3123,
    terms={"base": 2.1, "sampler": 1.9},
    learning_rate=1e-3,
    grad_norm=1.0,
    tokens_per_s=210.4,
    rows_per_s=9.0,
    peak_memory_bytes=1,
)


def show(stream: io.StringIO) -> str:
    with Display(stream) as display:
        display.log("30 sequences")
        for step in range(1, 12):
            display.event(Stepped(step=step, iters=100, seconds=10.0))
            if step == 10:
                display.event(REPORT)
                display.event(
                    Evaluated(step=10, evaluation=EVALUATION, next_token_loss=1.0, is_best=True)
                )
    return stream.getvalue()


def test_lines_are_plain_where_there_is_no_terminal():
    assert show(io.StringIO()).splitlines() == [
        "30 sequences",
        "step 10/100  loss 5.312 (base 2.10 sampler 1.90)  210 tok/s  ETA 15 min",
        "step 10: 2.500 tokens per step, drafts accepted 80% 50%  (best)",
    ]


def test_at_a_terminal_evaluations_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = show(Terminal())
    assert shown.count("\n") == 2
    assert "30 sequences\n" in shown and "(best)\n" in shown
    assert "\r" in shown


def test_texts_of_the_display():
    progress = DistilProgress(30, 100, 4000, Counter({"loop": 3}))
    assert data_line(progress, seconds=40.0, new=20) == (
        "writing text: 30/100 records  100 tok/s  ETA 2 min  (3 dropped)"
    )
    assert data_line(progress, seconds=0.0, new=0) == "writing text: 30/100 records  (3 dropped)"
    assert [duration(each) for each in (-1, 40.2, 59.7, 840, 7500)] == [
        "0 s", "40 s", "1 min", "14 min", "2 h 05 min",
    ]  # fmt: skip
    assert step_line(7, 7, report=None, left_s=0) == "step 7/7"
    other = Evaluated(step=3, evaluation=EVALUATION, next_token_loss=1.0, is_best=False)
    assert not evaluation_line(other).endswith("(best)")


def test_the_weights_of_an_evaluation_are_shown_and_tracked(tmp_path):
    worse = dataclasses.replace(EVALUATION, tokens_per_step=2.4)
    event = Evaluated(
        step=10,
        evaluation=EVALUATION,
        next_token_loss=1.0,
        is_best=True,
        weights="ema",
        results={"raw": worse, "ema": EVALUATION},
    )
    assert evaluation_line(event) == (
        "step 10: 2.500 tokens per step (EMA; raw 2.400), drafts accepted 80% 50%  (best)"
    )
    values = tracked_values(event)
    assert values["tokens_per_step"] == values["tokens_per_step/ema"] == 2.5
    assert values["tokens_per_step/raw"] == 2.4
    result = TrainResult(20, True, EVALUATION, 10, best_weights="ema")
    lines = summary_lines(RunFolder(tmp_path), [], result, model=None)
    assert "2.50 at step 10 (best, EMA weights), over 100 held-out tokens" in lines[0]
    recipe = recipe_of({}, seed=0, seconds=1.0, result=result)
    assert recipe["weights"] == "exponential moving average of step 10"
