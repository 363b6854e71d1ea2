"""Self-distillation with a tiny model whose letters are random, but readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.evaluation.batch_generation import generate_batch
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.data import distil_run
from mlx_mtp.train.data.distil import continue_text, distil
from mlx_mtp.train.data.distil_run import around_user, token_ids
from mlx_mtp.train.data.records import Record, RecordWriter, read_jsonl
from mlx_mtp.train.data.sequences import encode
from tests.helpers.fixtures_generate import EOS, TEMPLATE, byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, tiny_base

LETTERS = b"abcdefghijklmnopqrstuvwxyz "


class Readable(nn.Module):
    """A model that writes letters, spaces and ends only."""

    def __init__(self, base: Any, *, end: float) -> None:
        super().__init__()
        self.inner = base
        self.model_type = base.model_type
        self.args = base.args
        allowed = mx.zeros(BYTE_VOCAB) - 1e9
        allowed[mx.array(list(LETTERS))] = 0.0
        allowed[EOS] = end
        self._allowed = allowed

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return 0.3 * self.inner(ids, cache=cache) + self._allowed


def readable(*, end: float = 0.0, **overrides: Any) -> MTPModel:
    model = MTPModel(tiny_base(vocab_size=BYTE_VOCAB, **overrides), name="tiny")
    model.base = Readable(model.base, end=end)
    return model


OPTIONS: dict[str, Any] = {
    "max_prompt_tokens": 50,
    "max_answer_tokens": 25,
    "batch_size": 3,
    "answer_temp": 1.0,
}


def write(path: Path, **options: Any) -> list[Record]:
    return distil(readable(), byte_tokenizer(), path, **{"num_records": 8, **OPTIONS, **options})


def test_conversations_are_written_and_kept(tmp_path):
    told: list[Any] = []
    records = write(tmp_path / "data.jsonl", progress=told.append, topics=["..."])
    assert read_jsonl(tmp_path / "data.jsonl") == records
    assert len(records) == 8 == told[-1].num_records == told[-1].total
    assert told[-1].num_tokens > 100
    assert len({record.prompt for record in records}) == 8
    assert [each["role"] for each in records[0].messages or ()] == ["user", "assistant"]
    cut = [record for record in records if record.meta.get("cut")]
    assert cut and all(len(record.answers[0]) == 25 for record in cut)
    ended = [record for record in records if not record.meta.get("cut")]
    assert ended and encode(ended[0], byte_tokenizer(), max_seq_length=200).ids[-1] == EOS


def test_the_same_seed_gives_the_same_file(tmp_path):
    first, again = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    assert first == again
    assert first != write(tmp_path / "c.jsonl", seed=1)


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_an_interrupted_run_ends_with_the_same_file(tmp_path, monkeypatch, stop_after):
    write(tmp_path / "whole.jsonl")
    path, append, written = tmp_path / "part.jsonl", RecordWriter.append, []

    def stop(writer: RecordWriter, record: Record) -> None:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(record)
        append(writer, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordWriter, "append", stop)
        write(path)
    with path.open("a") as file:
        file.write('{"messages": [{"role"')
    write(path)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_more_records_may_be_asked_for_later(tmp_path):
    write(tmp_path / "whole.jsonl", num_records=14)
    write(tmp_path / "part.jsonl", num_records=5)
    assert len(write(tmp_path / "part.jsonl", num_records=3)) == 3
    write(tmp_path / "part.jsonl", num_records=14)
    whole, part = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("whole", "part"))
    assert whole == part


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, num_records=2)
    with pytest.raises(ValueError, match=r"was begun with seed 0, not 7, answer_temp 1.0, not 0.5"):
        write(path, seed=7, answer_temp=0.5)
    other = MTPModel(tiny_base(vocab_size=BYTE_VOCAB, seed=5))
    with pytest.raises(ValueError, match="was begun with fingerprint"):
        distil(other, byte_tokenizer(), path, num_records=2, backend="mlx", **OPTIONS)
    saved = json.loads(path.with_suffix(".settings.json").read_text())
    assert saved["generator"] == "mlx float32" and saved["version"] == distil_run.VERSION
    path.with_suffix(".settings.json").write_text(json.dumps(saved | {"version": 1}))
    with pytest.raises(ValueError, match="was begun by another version of mlx-mtp"):
        write(path, num_records=2)
    settings = path.with_suffix(".settings.json")
    settings.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        write(path)
    settings.unlink()
    with pytest.raises(ValueError, match="data.settings.json is missing"):
        write(path)
    path.write_text("")
    assert len(write(path, seed=3, num_records=1)) == 1
    assert json.loads(settings.read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_records": 0}, "num_records must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"answer_temp": -1.0}, "answer_temp must be at least 0, got -1"),
        ({"max_answer_tokens": 5000}, "is 5050, but tiny takes at most 4096"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        write(tmp_path / "data.jsonl", **options)
    assert not (tmp_path / "data.jsonl").exists()


def test_topics_are_taken_in_turn(tmp_path):
    before, behind = around_user(byte_tokenizer(), "rivers")
    assert before.startswith("<system>") and "rivers" in before and before.endswith("<user>")
    assert behind == "<eos><assistant>"
    records = write(tmp_path / "data.jsonl", topics=["rivers", "Write about..."])
    for record in records:
        assert record.meta["topic"] == ["rivers", "Write about..."][record.meta["number"] % 2]
        opened = record.prompt.startswith("Write about")
        assert opened == (record.meta["number"] % 2 == 1)
        assert all(message["role"] != "system" for message in record.messages or ())


def test_a_template_without_system_prompts_has_the_topic_in_the_user_turn(tmp_path):
    tokenizer = byte_tokenizer(template=TEMPLATE.replace("== 'tool'", "== 'system'"))
    before, after = around_user(tokenizer, "rivers")
    assert before.startswith("<user>") and "rivers" in before and "<system>" not in before
    assert after == "<eos><assistant>"
    path = tmp_path / "data.jsonl"
    records = distil(readable(), tokenizer, path, num_records=2, topics=["rivers"], **OPTIONS)
    assert all("rivers" not in record.prompt for record in records)


def test_a_model_without_a_template_writes_plain_text(tmp_path):
    told: list[str] = []
    tokenizer = byte_tokenizer(template=None)
    path = tmp_path / "data.jsonl"
    records = distil(readable(end=-5.0), tokenizer, path, num_records=4, log=told.append, **OPTIONS)
    assert told == ["tiny has no chat template: it continues plain text instead"]
    assert len(records) == 4 and all(len(record.text or "") > 25 for record in records)


def test_given_conversations_are_answered_turn_by_turn(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "NOT THE MODEL'S"},
        {"role": "user", "content": "Second?"},
    ]
    given = [
        Record((system, *turns)),
        Record(({"role": "user", "content": "Only?"},)),
        Record(text="Once upon a time there was a king. " * 2),
        Record(({"role": "assistant", "content": "No question"},)),
    ]
    path = tmp_path / "data.jsonl"
    model = readable(end=1.0)
    records = continue_text(model, byte_tokenizer(), given, path, seed=1, **OPTIONS)
    by_number = {record.meta["number"]: record for record in records}
    assert 3 not in by_number and 1 in by_number and 2 in by_number
    text = by_number[2]
    assert (text.text or "")[: text.meta["given"]] == "Once upon a time there was a king. "
    assert len(text.text or "") > text.meta["given"]
    if 0 in by_number:
        said = by_number[0].messages or ()
        assert said[:2] == (system, turns[0])
        assert all("NOT THE" not in each["content"] for each in said)
    assert continue_text(model, byte_tokenizer(), given, path, seed=1, **OPTIONS) == records
    with pytest.raises(ValueError, match="begun with data"):
        continue_text(model, byte_tokenizer(), given[:2], path, seed=1, **OPTIONS)
    with pytest.raises(ValueError, match="no records to continue"):
        continue_text(model, byte_tokenizer(), [], path)


def test_a_model_that_writes_nothing_usable_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"tiny generated no usable text \(dropped: .*prompt: empty"
    ):
        options = OPTIONS | {"num_records": 1, "topics": ["..."]}
        distil(readable(end=1e4), byte_tokenizer(), tmp_path / "a.jsonl", **options)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_batched_answers_are_the_model_s_own(kind):
    """Greedy answers in a batch are those of one at a time, whatever the neighbours' lengths."""
    model = MTPModel(tiny_base(kind, vocab_size=BYTE_VOCAB))
    prompts = [list(range(1, length)) for length in (3, 9, 14, 5, 7)]
    found: dict[int, list[int]] = {}
    for index, ids, _ in generate_batch(
        model,
        prompts,
        max_tokens=12,
        stops=[[EOS]],
        batch_size=2,
    ):
        found[index] = ids
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(len(found[index])):
            ids.append(int(model.base(mx.array([ids]))[0, -1].argmax().item()))
        assert found[index] == ids[len(prompt) :]


def test_stops_of_several_ids_end_a_message(tmp_path):
    """Templates may end a user's message with words and no special token."""
    template = "{% for m in messages %}{{ '[' + m.content + 'e ' }}{% endfor %}"
    tokenizer = byte_tokenizer(template=template)
    assert token_ids(tokenizer, around_user(tokenizer)[1]) == [ord("e")]
    records = distil(
        readable(end=-1e9),
        tokenizer,
        tmp_path / "data.jsonl",
        num_records=2,
        topics=["..."],
        **OPTIONS,
    )
    assert all("e" not in record.prompt for record in records)


def test_answers_end_where_they_repeat(tmp_path):
    """Greedy text of a random model repeats soon; the part before is kept."""
    records = write(tmp_path / "data.jsonl", answer_temp=0.0, max_answer_tokens=200)
    cut = [record for record in records if record.meta.get("loop")]
    assert cut and all(record.meta["cut"] for record in cut)
    for record in records:
        letters = record.answers[-1].encode()
        runs = [letters[i : i + 16] for i in range(len(letters) - 15)]
        assert len(set(runs)) == len(runs)


def test_draws_depend_on_their_number_only_and_keep_to_the_likely_ids():
    logits = np.log(np.array([0.5, 0.3, 0.17, 0.02, 0.01]))
    ids = [distil_run.Draw(0, number, "prompt", temp=1.0)(logits) for number in range(2000)]
    assert ids == [distil_run.Draw(0, n, "prompt", temp=1.0)(logits) for n in range(2000)]
    counts = np.bincount(ids, minlength=5) / 2000
    assert np.allclose(counts, np.array([0.5, 0.3, 0.17, 0, 0]) / 0.97, atol=0.04)
    cold = [distil_run.Draw(0, number, "prompt", temp=0.01)(logits) for number in range(50)]
    assert set(cold) == {0}
    flat = np.zeros(1000)  # more likely ids than are looked at first
    assert {distil_run.Draw(0, n, "a", temp=1.0)(flat) > 256 for n in range(50)} == {False, True}
