"""Training data: reading, cleaning, encoding, holding out."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.storage.files import remove_drafts, write_atomically
from mlx_mtp.train.data import sources
from mlx_mtp.train.data.records import (
    Record,
    RecordWriter,
    data_hash,
    parse_record,
    read_json,
    read_jsonl,
)
from mlx_mtp.train.data.sequences import encode, encode_all, split
from mlx_mtp.train.data.sources import read_data, split_text
from tests.helpers.fixtures_generate import ASSISTANT, EOS, byte_tokenizer, ids_of

ASKED = {"role": "user", "content": "Why is the sky blue?"}
TOLD = {"role": "assistant", "content": "Because air scatters blue light."}
CHAT = Record((ASKED, TOLD))


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [ASKED, TOLD]},
        {
            "conversations": [
                {"from": "human", "value": ASKED["content"]},
                {"from": "gpt", "value": TOLD["content"]},
            ]
        },
        {"prompt": ASKED["content"], "completion": TOLD["content"]},
        {"prompt": ASKED["content"], "response": TOLD["content"]},
        {"prompt": [ASKED], "completion": [TOLD]},
        {"messages": [{**ASKED, "content": [{"type": "text", "text": ASKED["content"]}]}, TOLD]},
    ],
)
def test_every_shape_of_a_chat_is_read(line):
    assert parse_record(line).messages == CHAT.messages


def test_plain_text_and_unanswered_prompts_are_read():
    assert parse_record({"text": "Once."}).text == "Once."
    assert parse_record({"prompt": "Why?"}).messages == ({"role": "user", "content": "Why?"},)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "not JSON"),
        ('{"a": 1}', "found 'a'"),
        ('{"text": " "}', "'text' is empty"),
        ('{"text": 3}', "must be a string, got 3"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": []}', "must be a list of messages"),
        ('{"messages": [1]}', r"messages\[0\] must be an object"),
        ('{"messages": [{"role": "cat", "content": "x"}]}', "unknown role 'cat'"),
        ('{"messages": [{"role": "user", "content": [{"image": 1}]}]}', "only text"),
        ('{"messages": [{"role": "user"}]}', "must be a string, got null"),
        ("[" * 100000, "not JSON|too deep"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 3: .*({reason})") as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_jsonl(path)


def test_a_json_list_is_read_and_its_bad_entry_named(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    assert [record.text for record in read_json(path)] == ["a", "b"]
    path.write_text(json.dumps([{"text": "a"}, {"words": "b"}]))
    with pytest.raises(ValueError, match="entry 2"):
        read_json(path)


def test_records_survive_a_round_trip(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [
        Record((ASKED, TOLD), source="magpie", meta={"number": 3, "cut": True}),
        Record(text="Line\u2028separator\nand é", source="a.txt"),
    ]
    with RecordWriter(path) as writer:
        for record in records:
            writer.append(record)
    assert read_jsonl(path) == records
    with RecordWriter(path) as writer:
        assert writer.records == records


@pytest.mark.parametrize("torn", ['{"text": "b', '{"text": "b"}', "\xc3"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + torn.encode("latin-1"))
    with RecordWriter(path) as writer:
        writer.append(Record(text="c"))
    assert [record.text for record in read_jsonl(path)] == ["a", "c"]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path, write = tmp_path / "data.jsonl", os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:-15])

    with RecordWriter(path) as writer:
        writer.append(Record(text="a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(OSError, match=r"No space.*data\.jsonl"):
                writer.append(Record(text="b" * 100))
        writer.append(Record(text="c"))
        assert [record.text for record in writer.records] == ["a", "c"]
    assert [record.text for record in read_jsonl(path)] == ["a", "c"]


def test_one_process_writes_at_a_time(tmp_path):
    with (
        RecordWriter(tmp_path / "data.jsonl"),
        pytest.raises(ValueError, match="another process"),
    ):
        RecordWriter(tmp_path / "data.jsonl")


def test_a_small_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "settings.json"
    write_atomically(path, "1")
    write_atomically(path, "2")
    assert path.read_text() == "2"
    assert os.listdir(path.parent) == ["settings.json"]


def test_what_killed_writes_left_is_removed(tmp_path):
    for name in (".settings.json.123", "settings.json", ".lock", "state-0000003"):
        (tmp_path / name).touch()
    remove_drafts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "settings.json", "state-0000003"]


def test_the_hash_is_of_the_words():
    other = Record(CHAT.messages, source="elsewhere", meta={"number": 1})
    assert data_hash([CHAT]) == data_hash([other]) != data_hash([Record(text="x")])
    assert len(data_hash([])) == 64


def test_a_text_is_split_at_paragraphs():
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 20 for i in range(40))
    pieces = split_text(text, piece_chars=500)
    assert "\n\n".join(pieces) == text
    assert all(200 < len(piece) <= 500 and piece.startswith("Paragraph") for piece in pieces)


def test_long_paragraphs_are_split_at_lines_and_long_lines_anywhere():
    pieces = split_text("a" * 25 + "\n" + "b" * 5, piece_chars=10)
    assert pieces == ["a" * 10, "a" * 10, "a" * 5, "b" * 5]
    lines = "\n".join("x" * 30 for _ in range(10))
    assert all(set(piece.split("\n")) == {"x" * 30} for piece in split_text(lines, piece_chars=100))
    assert split_text(" \n\n \n") == []


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.md").write_text("# Heading\r\n\r\nWords.")
    (tmp_path / "text" / "a.py").write_text("print('é')\n", encoding="utf-8")
    (tmp_path / "text" / ".hidden").write_text("secret")
    (tmp_path / "text" / "image.png").write_bytes(b"\x89PNG\0\0")
    told = []
    records = read_data(tmp_path / "text", log=told.append)
    assert [(each.source, each.text) for each in records] == [
        ("a.py", "print('é')"),
        ("b.md", "# Heading\n\nWords."),
    ]
    assert told == ["Skipped 1 files that are not UTF-8 text: image.png"]
    (tmp_path / "text" / "z.jsonl").write_text('{"text": "only this"}')
    assert [each.text for each in read_data(str(tmp_path / "text"))] == ["only this"]
    assert read_data(tmp_path / "text" / "b.md")[0].text == "# Heading\n\nWords."


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.jsonl", b"", "contains no text to train on"),
        ("blank.txt", b" \n\n", "contains no text to train on"),
        ("image.png", b"\x89PNG\0", "neither JSONL nor UTF-8 text"),
        ("train.parquet", b"PAR1", "is a table: write it as JSONL first.*read_parquet"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_data(tmp_path / name)
    with pytest.raises(ValueError, match="contains no|is a table"):
        read_data(tmp_path)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_data(tmp_path / "nothing")
    with pytest.raises(ValueError, match="contains no text"):
        read_data(tmp_path)


def test_a_hub_data_set_is_read(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "train.json").write_text('[{"text": "from the hub"}]')
    (tmp_path / "dataset_infos.json").write_text("{}")
    calls = []

    def download(name, **options):
        calls.append((name, options["repo_type"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sources.read_data("owner/name")[0].text == "from the hub"
    assert calls == [("owner/name", "dataset")]
    (tmp_path / "train.json").unlink()
    with pytest.raises(ValueError, match="Parquet is not read"):
        sources.read_data("owner/name")


def test_a_hub_that_fails_is_told_in_a_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"cannot find data owner/name .*no network$"):
        read_data("owner/name")


def shown(sequence: TokenSequence) -> str:
    """The answer tokens of a byte-tokenised sequence as text; specials as <id>."""
    kept = [id for id, flag in zip(sequence.ids, sequence.answer, strict=True) if flag]
    return "".join(chr(id) if id < 256 else f"<{id}>" for id in kept)


def test_only_answers_and_their_ends_are_answers():
    more = [{"role": "user", "content": "And at dusk?"}, {"role": "assistant", "content": "Red."}]
    system = {"role": "system", "content": "Be brief."}
    record = Record((system, ASKED, TOLD, *more))
    sequence = encode(record, byte_tokenizer(), max_seq_length=500)
    assert shown(sequence) == f"{TOLD['content']}<{EOS}>Red.<{EOS}>"
    first = sequence.answer.index(True)
    assert sequence.ids[first - 1] == ASSISTANT
    assert not sequence.cut


def test_what_follows_the_end_token_is_no_answer():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<eos>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    sequence = encode(CHAT, byte_tokenizer(template=template), max_seq_length=500)
    assert shown(sequence) == f"{TOLD['content']}<{EOS}>"
    assert sequence.ids[-1] == 10 and not sequence.answer[-1]


def test_a_template_that_changes_earlier_turns_is_understood():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '[thought] ' }}{% endif %}"
        "{{ m.content | trim }}{{ '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>[think' }}{% endif %}"
    )
    record = Record((ASKED, {**TOLD, "content": " One. "}, ASKED, {**TOLD, "content": "Two."}))
    sequence = encode(record, byte_tokenizer(template=template), max_seq_length=500)
    assert shown(sequence) in (f"One.<{EOS}>Two.<{EOS}>", f"One.<{EOS}>[thought] Two.<{EOS}>")


def test_a_template_without_end_tokens_ends_with_the_words():
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    record = Record((ASKED, TOLD, ASKED, TOLD))
    sequence = encode(record, byte_tokenizer(template=template), max_seq_length=500)
    assert shown(sequence) == TOLD["content"] * 2


def test_a_cut_answer_has_no_end_token():
    record = Record((ASKED, TOLD), meta={"cut": True})
    sequence = encode(record, byte_tokenizer(), max_seq_length=500)
    assert shown(sequence) == TOLD["content"]
    assert sequence.answer[-1]


def test_plain_text_is_an_answer_as_a_whole():
    tokenizer = byte_tokenizer()
    sequence = encode(Record(text="Once upon"), tokenizer, max_seq_length=500)
    assert (sequence.ids, sequence.answer) == (ids_of("Once upon"), [True] * 9)
    sequence = encode(Record(text="Once upon", meta={"given": 5}), tokenizer, max_seq_length=500)
    assert shown(sequence) == "upon"
    bare = byte_tokenizer(template=None)
    assert shown(encode(CHAT, bare, max_seq_length=500)).startswith("Why is the sky blue?\n\nBec")


def test_the_kind_of_a_record_is_that_of_its_sequence():
    tokenizer = byte_tokenizer()
    for meta, kind in (({"kind": "code"}, "code"), ({}, ""), ({"kind": 3}, "")):
        record = Record(text="Once upon", meta=meta)
        assert encode(record, tokenizer, max_seq_length=500).kind == kind


def test_long_and_short_records_are_counted():
    tokenizer = byte_tokenizer()
    tool = Record(({"role": "tool", "content": "x"}, TOLD))
    short = Record((ASKED, {**TOLD, "content": "No."}))
    long = Record(text="Once upon a time " * 10)
    encoded = encode_all([CHAT, long, short, tool], tokenizer, max_seq_length=60)
    assert [len(each.ids) for each in encoded.sequences] == [len(CHAT.prompt) + 36, 60]
    assert encoded.num_cut == 1
    assert encoded.lines() == [
        "2 sequences, 116 tokens, 93 of them in answers",
        "1 sequences were longer than the context and were truncated",
        "1 records dropped: fewer than 8 tokens of answer",
        "1 records dropped: the chat template refuses the conversation",
    ]
    with pytest.raises(ValueError, match="too little data: 1 usable sequences.*1 dropped: fewer"):
        encode_all([CHAT, short], tokenizer, max_seq_length=60)


def numbered(count: int) -> list[TokenSequence]:
    return [
        TokenSequence([number, 7, 1, 2, 3], [False, False, True, True, True])
        for number in range(count)
    ]


def test_the_held_out_side_is_stable():
    few, many = split(numbered(400)), split(numbered(800))
    assert 8 <= len(few[1]) <= 36
    assert [each for each in many[1] if each.ids[0] < 400] == few[1]
    assert len(many[0]) + len(many[1]) == 800


def test_the_same_question_is_on_one_side():
    twins = [TokenSequence([3, 7, answer, 2], [False, False, True, True]) for answer in range(50)]
    sides = split([*twins, *numbered(3)], held_out=0.5)
    assert sum(any(each.ids[:2] == [3, 7] for each in side) for side in sides) == 1


@pytest.mark.parametrize("count", [2, 3, 10])
def test_few_sequences_are_on_both_sides(count):
    train, held_out = split(numbered(count), held_out=0.01)
    assert train and len(held_out) == 1
    train, held_out = split(numbered(count), held_out=0.99)
    assert train and held_out


def test_a_split_needs_two_and_a_share():
    with pytest.raises(ValueError, match="too little data: 1 different"):
        split(numbered(1) * 3)
    with pytest.raises(ValueError, match="too little data: 0 different"):
        split([])
    with pytest.raises(ValueError, match="above 0 and below 1, got 1.5"):
        split(numbered(3), held_out=1.5)


def test_files_are_closed(tmp_path):
    path: Path = tmp_path / "bad.jsonl"
    path.write_text("oops\n")
    for _ in range(3):
        with pytest.raises(ValueError, match="line 1: not JSON"):
            RecordWriter(path)
