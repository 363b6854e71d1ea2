"""The built-in prompts are complete and distinct; a bad line of a user's file is named."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from mlx_mtp.evaluation.prompts import (
    BENCHMARK_KINDS,
    ENGLISH_KINDS,
    KINDS,
    Prompt,
    builtin_prompts,
    read_prompts,
)

GOOD = b'{"prompt": "What is a fjord?"}\n'


def write(folder: Path, data: bytes) -> Path:
    path = folder / "mine.jsonl"
    path.write_bytes(data)
    return path


def test_twelve_of_each_kind_in_order() -> None:
    prompts = builtin_prompts()
    expected = [f"{kind}-{number:02d}" for kind in KINDS for number in range(1, 13)]
    assert [prompt.id for prompt in prompts] == expected
    assert Counter(prompt.kind for prompt in prompts) == dict.fromkeys(KINDS, 12)
    assert all(prompt.id.startswith(prompt.kind + "-") for prompt in prompts)


def test_the_kinds_for_benchmarks_come_on_top() -> None:
    every = builtin_prompts(BENCHMARK_KINDS)
    assert every[:72] == builtin_prompts()  # figures in the README were measured on these
    counts = {"summary": 8, "extraction": 8, "rewrite": 12}
    assert tuple(counts) == BENCHMARK_KINDS[6:]
    more = [f"{kind}-{at + 1:02d}" for kind, count in counts.items() for at in range(count)]
    assert [prompt.id for prompt in every[72:]] == more
    assert all(prompt.id.startswith(prompt.kind + "-") for prompt in every)


def test_ids_and_texts_are_unique() -> None:
    prompts = builtin_prompts(BENCHMARK_KINDS)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({" ".join(prompt.text.split()).lower() for prompt in prompts}) == len(prompts)


def test_lengths_are_ordinary() -> None:
    limits = {
        "edit": (60, 200),
        "summary": (60, 200),
        "extraction": (60, 200),
        "rewrite": (40, 100),
    }
    for prompt in builtin_prompts([*ENGLISH_KINDS, *BENCHMARK_KINDS[6:]]):
        words = len(prompt.text.split())
        low, high = limits.get(prompt.kind, (8, 150))
        assert low <= words <= high, (prompt.id, words)
    for prompt in builtin_prompts(["languages"]):
        assert 30 <= len(prompt.text) <= 400, prompt.id


def test_texts_are_clean_and_only_languages_leave_ascii() -> None:
    for prompt in builtin_prompts(BENCHMARK_KINDS):
        assert prompt.text == prompt.text.strip()
        assert "\ufffd" not in prompt.text and "\r" not in prompt.text
        if prompt.kind != "languages":
            assert prompt.text.isascii(), prompt.id


def test_builtin_file_is_plain_utf8_jsonl() -> None:
    data = (files("mlx_mtp.evaluation") / "prompts.jsonl").read_bytes()
    assert not data.startswith(b"\xef\xbb\xbf")
    assert data.endswith(b"}\n") and b"\r" not in data and b"\n\n" not in data
    for line in data.decode("utf-8").split("\n")[:-1]:
        assert list(json.loads(line)) == ["id", "kind", "prompt"]


def test_kinds_select_in_file_order() -> None:
    assert ENGLISH_KINDS == ("chat", "code", "maths", "lists", "edit")
    assert len(builtin_prompts(ENGLISH_KINDS)) == 60
    some = builtin_prompts(["maths", "code"])
    assert [prompt.kind for prompt in some] == ["code"] * 12 + ["maths"] * 12


@pytest.mark.parametrize(("kinds", "shown"), [(["chat", "poems"], "poems"), ([], r"\[\]")])
def test_unknown_or_no_kinds_are_refused(kinds: list[str], shown: str) -> None:
    with pytest.raises(ValueError, match=f"kinds must be among chat, .*got .*{shown}"):
        builtin_prompts(kinds)


def test_prompt_is_frozen() -> None:
    prompt = Prompt("a", "chat", "Hello")
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.text = "Bye"  # pyright: ignore[reportAttributeAccessIssue]


def test_builtin_file_reads_back_as_a_user_file(tmp_path: Path) -> None:
    data = (files("mlx_mtp.evaluation") / "prompts.jsonl").read_bytes()
    assert read_prompts(write(tmp_path, data)) == builtin_prompts(BENCHMARK_KINDS)


def test_user_file_defaults(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "One"}',
        "",
        '{"text": " Zwei\u2028und drei ", "kind": "poems", "id": "mine", "source": 3}',
    ]
    path = write(tmp_path, "\r\n".join(lines).encode("utf-8"))
    assert read_prompts(str(path)) == [
        Prompt("line-1", "user", "One"),
        Prompt("mine", "poems", " Zwei\u2028und drei "),
    ]


def test_user_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD)
    assert read_prompts(path) == [Prompt("line-1", "user", "What is a fjord?")]


BAD_LINES = {
    "not JSON": (b"What is a fjord?", r"not JSON \(Expecting value at column 1\)"),
    "cut off": (b'{"prompt": "What', r"not JSON \(Unterminated string"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8"),
    "too deep": (b"[" * 200_000, "not JSON that can be read"),
    "long number": (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "list": (b'["prompt"]', "expected a JSON object, got list"),
    "string": (b'"prompt"', "expected a JSON object, got str"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "no text": (b'{"id": "a"}', "'prompt' and 'text', found neither"),
    "two texts": (b'{"prompt": "a", "text": "b"}', "'prompt' and 'text', found both"),
    "number": (b'{"prompt": 7}', "'prompt' must be a string, got 7"),
    "null text": (b'{"text": null}', "'text' must be a string, got null"),
    "empty": (b'{"prompt": ""}', "'prompt' is empty"),
    "blank": (b'{"text": " \\n"}', "'text' is empty"),
    "kind": (b'{"prompt": "a", "kind": ["chat"]}', "'kind' must be a string, got list"),
    "blank kind": (b'{"prompt": "a", "kind": " "}', "'kind' is empty"),
    "id": (b'{"prompt": "a", "id": 4}', "'id' must be a string, got 4"),
    "null id": (b'{"prompt": "a", "id": null}', "'id' must be a string, got null"),
    "empty id": (b'{"prompt": "a", "id": ""}', "'id' is empty"),
    "surrogate": (b'{"prompt": "a \\ud83d"}', "'prompt' contains half of a surrogate pair"),
    "same id": (b'{"prompt": "a", "id": "line-1"}', "id 'line-1' was used on line 1"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 3: .*{reason}") as caught:
        read_prompts(path)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"mine\.jsonl: no prompts in this file"):
        read_prompts(write(tmp_path, data))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "absent.jsonl")
