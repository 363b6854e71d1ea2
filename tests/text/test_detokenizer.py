"""Streamed text is the decoded text, whatever the tokenizer and the ids."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import utils as lm_utils
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)

from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.generate import generate, stream_generate
from mlx_mtp.loading import load
from mlx_mtp.storage.default_model import default_model_path
from mlx_mtp.text.detokenizer import Detokenizer, is_utf8, load_tokenizer
from tests.helpers.tiny import save_tiny_model, tiny_mtp
from tests.helpers.tokenizers import KINDS, make

STOCK: list[Any] = [NaiveStreamingDetokenizer, SPMStreamingDetokenizer, BPEStreamingDetokenizer]
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
    for index in range(min(end_of(kind), 2000)):
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


def streamed(kind: str, prompt: list[int], answer: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer_of(kind), prompt)
    for token in answer:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Unigram, bytes", "byte-level", "Tekken"])
@pytest.mark.parametrize(
    "answer", ["    return a + b", " Paris", "x\0y", "a\ufffd", "\ufffd", "é 🙂"]
)
def test_a_continued_text_keeps_its_first_spaces_and_every_character(kind, answer):
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("a b:", add_special_tokens=False)
    ids = tokenizer.encode(f"a b:{answer}", add_special_tokens=False)[len(prompt) :]
    assert streamed(kind, prompt, ids) == answer


@pytest.mark.parametrize(
    ("kind", "tokens", "text"),
    [
        ("Metaspace, always", ["▁Hello", "▁."], " Hello ."),
        ("Llama", ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁Hello"], "🙂 Hello"),
        ("Llama", ["a", "<0xE6>", "<0x97>"], "a\ufffd\ufffd"),
        ("Llama", ["<0xC3>", "<0xA9>", "<0xFF>", "a"], "\ufffd\ufffd\ufffda"),  # as ByteFallback
        ("byte-level", ["æ", "Ĺ"], "\ufffd"),
        ("byte-level", ["æ", "Ĺ", "¥", "Ã"], "日\ufffd"),
        ("byte-level, added", ["<a b>", " x ", "<é日>"], "<a b> x <é日>"),
        ("WordPiece", ["a", "##b", "'", "##.", "."], " ab '.."),
    ],
)
def test_the_text_of_tokens_after_a_prompt(kind, tokens, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert streamed(kind, [tokenizer.convert_tokens_to_ids("a")], ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_without_a_token_has_no_text(kind):
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("a", add_special_tokens=False)
    ids = [token for token in prompt for _ in range(2)]
    beyond = end_of(kind) + 1
    assert streamed(kind, prompt, [beyond, *ids, beyond, beyond + 2**20]) == streamed(
        kind, prompt, ids
    )


@pytest.mark.parametrize("kind", ["byte-level, foreign decoder", "byte-level, joined"])
def test_a_byte_level_vocabulary_gets_its_decoder(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("How can I, né?", add_special_tokens=False)
    assert tokenizer.decode(ids) == "How can I, né?"


def test_a_sentencepiece_vocabulary_gets_its_decoder():
    tokenizer = make("Llama, foreign decoder")
    ids = tokenizer.encode("a Hello b", add_special_tokens=False)
    assert tokenizer.decode(ids) != "a Hello b"
    Detokenizer(tokenizer)
    assert tokenizer.decode(ids) == "a Hello b"


@pytest.mark.parametrize("kind", ["Llama, holes", "Llama", "byte-level", "WordPiece"])
def test_a_fitting_decoder_is_kept(kind):
    tokenizer = make(kind)
    before = tokenizer.backend_tokenizer.to_str()
    Detokenizer(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_is_loaded_as_mlx_lm_loads_it():
    ours, stock = tokenizer_of("default model"), lm_utils.load_tokenizer(default_model_path())
    assert type(ours) is type(stock) and ours.eos_token_ids == stock.eos_token_ids
    assert ours.has_chat_template and ours.chat_template == stock.chat_template
    assert (ours.tool_call_start, ours.has_thinking) == (stock.tool_call_start, stock.has_thinking)
    assert isinstance(ours.detokenizer, Detokenizer)
    assert (
        ours.detokenizer is not ours.detokenizer
        and ours.detokenizer.pieces is ours.detokenizer.pieces
    )


def test_a_vocabulary_with_holes_loads_and_answers(tmp_path):
    """Whatever the model draws: tokens, holes, ids beyond the vocabulary."""
    folder = save_tiny_model(tmp_path / "model", vocab_size=1200, eos_token_id=2)
    make("Llama, holes").save_pretrained(folder)
    model, tokenizer = load(str(folder))
    tokenizer.eos_token_ids = ()
    prompt, drawn = tokenizer.encode("Hello"), []
    for seed in range(4):
        responses = list(
            stream_generate(
                model, tokenizer, prompt, max_tokens=40, sampling=Sampling(temp=9.0), seed=seed
            )
        )
        ids = [response.token for response in responses]
        expected = added_text(tokenizer, prompt, ids)
        assert "".join(response.text for response in responses) == expected
        drawn += ids
    assert {tokenizer.convert_ids_to_tokens(token) is None for token in drawn} == {True, False}


def test_tokenizers_of_mlx_lm_give_the_same_text():
    """Its wrapper, with any of its own detokenizers, and a bare tokenizer."""
    model = tiny_mtp(vocab_size=320)
    bare: Any = make("Llama")
    texts = {
        generate(model, tokenizer, [5, 6], max_tokens=30, seed=1, sampling=Sampling(temp=5.0))
        for tokenizer in (bare, *(TokenizerWrapper(bare, kind) for kind in STOCK))
    }
    assert len(texts) == 1


def test_a_long_text_without_spaces_is_streamed():
    """Also where a few ids are decoded again for each new one."""
    detokenizer = Detokenizer(tokenizer_of("Unigram, clean-up"), [1])
    ids = tokenizer_of("Unigram, clean-up").convert_tokens_to_ids([*"日é", "▁Hello"] * 300)
    waits = []
    for token in ids:
        detokenizer.add_token(token)
        waits.append(len(detokenizer._reader.pending))
    assert max(waits) <= len(" Hello") + 1
    detokenizer.finalize()
    assert detokenizer.text == "日é Hello" * 300
