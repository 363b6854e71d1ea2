"""Conversations by a command, and their users' part."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.lab.texts import main, read_ids, read_prompts, users_part, write_prompts
from mlx_mtp.train.data.records import Record, read_jsonl
from mlx_mtp.train.data.sequences import encode, token_ids
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.train.test_distil import readable

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mtp.loading.load", lambda *_, **__: (readable(), byte_tokenizer()))


def run(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_conversations_are_written_and_their_messages_stored(tmp_path: Path) -> None:
    output, store = tmp_path / "a.jsonl", tmp_path / "prompts.jsonl.xz"
    options = ("--max-answer-tokens", 25, "--batch-size", 4)
    facts = run("--output", output, "--num", 6, "--seed", 3, "--store", store, *options)
    records = read_jsonl(output)
    assert facts["records"] == len(records) == 6 == sum(facts["kinds"].values())
    assert facts["generated_tokens"] >= facts["answer_tokens"] > 6 * 8
    assert facts["tokens_per_cpu_s"] > 0 and facts["generator"] == "mlx float32"
    stored = read_prompts(store)
    assert [each.prompt for each in stored] == [each.prompt for each in records]
    assert all(not each.answers for each in stored)
    again = run("--output", tmp_path / "b.jsonl", "--prompts", store, *options)
    assert again["records"] == 6
    assert {each.prompt for each in read_jsonl(tmp_path / "b.jsonl")} == {
        each.prompt for each in records
    }


def test_the_same_seed_gives_the_same_texts(tmp_path: Path) -> None:
    options = ("--num", 3, "--max-answer-tokens", 20, "--batch-size", 3)
    for name in "ab":
        run("--output", tmp_path / f"{name}.jsonl", *options)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_only_messages_of_the_user_that_were_answered_are_stored(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant", "user")
    record = Record(tuple({"role": role, "content": f"{role} é"} for role in roles))
    assert users_part(record).messages == (record.messages or ())[:2]
    path = tmp_path / "a.jsonl.xz"
    write_prompts(path, [record])
    assert "é" in lzma.decompress(path.read_bytes()).decode()
    assert read_prompts(path) == [users_part(record)]
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or not compressed"):
        read_prompts(path)


def test_messages_are_found_in_ids(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    chats = [
        ["Hello?", "Hi.", "More?", "Yes."],
        ["A\nB", "Cut off"],
    ]
    roles = ("user", "assistant")
    records = [
        Record(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(chat)))
        for chat in chats
    ]
    records.append(Record(({"role": "system", "content": "Own"}, *(records[0].messages or ()))))
    ids = [encode(each, tokenizer, max_seq_length=999).ids for each in records]
    ids[1] = ids[1][: -len(token_ids(tokenizer, " off<|im_end|>\n"))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"ids": each}) + "\n" for each in ids))
    found = read_ids(path, tokenizer)
    assert [users_part(each).messages for each in found] == [
        users_part(each).messages for each in records
    ]
    path.write_text('{"ids": [72, 105]}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the text is not a conversation"):
        read_ids(path, tokenizer)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--store", str(tmp_path / "a")])
    assert done.exit_code == 2 and "expected --output, or --ids with --store" in done.output
