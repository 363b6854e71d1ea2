"""Streamed text is the decoded text, whatever the tokenizer and the ids."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.detokenizer import Detokenizer, is_utf8, load_tokenizer
from mlx_mtp.storage.default_model import default_model_path
from tests.helpers.tokenizers import KINDS, make

ALL = [*KINDS, "default model"]
TEXT = st.text(st.sampled_from("ab n.',?'é日🙂\0\ufffd\n "), max_size=6)
CUT = st.sampled_from(["é", "日", "🙂", "\ufffd"]).flatmap(
    lambda text: st.integers(1, 4).map(lambda size: text.encode()[:size])
)


@cache
def tokenizer_of(kind: str) -> Any:
    return load_tokenizer(default_model_path()) if kind == "default model" else make(kind)


@cache
def end_of(kind: str) -> int:
    """The last id with a token."""
    return max(tokenizer_of(kind).get_vocab().values())


@cache
def byte_ids(kind: str) -> list[list[int]]:
    """Ids of each byte, if the vocabulary has them."""
    tokenizer = tokenizer_of(kind)
    pieces = Detokenizer(tokenizer).pieces
    found: list[list[int]] = [[] for _ in range(256)]
    for index in range(end_of(kind)):
        if isinstance(piece := pieces[index], bytes) and len(piece) == 1:
            found[piece[0]].append(index)
    return found


@st.composite
def sequences(draw: Any, kind: str) -> tuple[list[int], list[int]]:
    """A prompt and an answer: texts, cut characters, any ids, ids without a token."""
    tokenizer, ids = tokenizer_of(kind), []
    any_id = st.integers(0, end_of(kind) + 9)
    for part in draw(st.lists(TEXT | CUT | any_id, min_size=1, max_size=8)):
        match part:
            case str():
                ids += tokenizer.encode(part, add_special_tokens=draw(st.booleans()))
            case bytes():
                ids += [index for byte in part for index in byte_ids(kind)[byte][:1]]
            case _:
                ids.append(part)
    split = draw(st.integers(0, len(ids)))
    return ids[:split], ids[split:]


def added_text(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """What ``decode`` shows of an answer."""
    whole, head = tokenizer.decode(prompt + answer), tokenizer.decode(prompt)
    return whole[len(os.path.commonprefix([whole, head])) :]


def check(kind: str, prompt: list[int], answer: list[int], *, logprobs: bool) -> None:
    tokenizer = tokenizer_of(kind)
    detokenizer = detokenizers(kind)
    detokenizer.reset(prompt)
    expected, text = added_text(tokenizer, prompt, answer), ""
    for token in answer:
        detokenizer.add_token(token)
        text += detokenizer.last_segment
        assert expected.startswith(text)
    detokenizer.finalize()
    assert text + detokenizer.last_segment == expected == detokenizer.text
    if logprobs and answer:
        check_logprobs(kind, prompt, answer, expected)


@cache
def detokenizers(kind: str) -> Detokenizer:
    return Detokenizer(tokenizer_of(kind))


@cache
def token_texts(kind: str) -> TokenTexts:
    class Wrapped:
        detokenizer = detokenizers(kind)

    return TokenTexts(Wrapped())  # type: ignore[arg-type]


def check_logprobs(kind: str, prompt: list[int], answer: list[int], text: str) -> None:
    """The bytes of the entries are the text, however they are taken."""
    found = token_texts(kind).of_answer(prompt, top=0, stop_ids=())
    entries = []
    for token in answer:
        found.add([token], mx.zeros((1, max(answer) + 1)))
        entries += found.take(0, is_end=False)
    assert not entries
    entries = found.take(len(text), is_end=True)
    assert len(entries) == len(answer)
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    head = tokenizer_of(kind).decode(prompt)
    byte_level = detokenizers(kind).pieces.byte_level  # in others a byte may be U+FFFD in the text
    is_changed = not tokenizer_of(kind).decode(prompt + answer).startswith(head)
    if head and not is_changed and "\ufffd" not in (head if byte_level else head + text):
        assert data.decode("utf-8", "replace") == text
    for entry in entries:
        own = bytes(entry["bytes"])
        assert entry["token"] == own.decode() if is_utf8(own) else entry["token"][:6] == "bytes:"


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(kind, data):
    check(kind, *data.draw(sequences(kind)), logprobs=True)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
@settings(max_examples=1000)
def test_streamed_text_is_the_decoded_text_of_many_sequences(kind, data):
    check(kind, *data.draw(sequences(kind)), logprobs=True)
