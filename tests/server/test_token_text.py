"""Logprobs: the bytes of the tokens are the text of the answer, whatever ends it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.apps.server.api.openai_completions import _by_token, _Offsets
from mlx_mtp.calibration.stored_costs import speculation_for
from mlx_mtp.generate import stream_generate
from mlx_mtp.model.caches.blocks import CacheBlocks
from mlx_mtp.text.detokenizer import is_utf8
from tests.helpers.tiny import tiny_mtp
from tests.helpers.tokenizers import make
from tests.server.sessions import messages_of

MODEL = tiny_mtp(vocab_size=320)


def engine_of(kind: str) -> Engine:
    tokenizer = TokenizerWrapper(make(kind))
    return Engine(
        model=MODEL,
        tokenizer=tokenizer,
        speculation=speculation_for(MODEL),
        prefixes=PrefixCache(CacheBlocks(MODEL, chunk_size=8), max_bytes=0),
        texts=TokenTexts(tokenizer),
        prefill_step_size=8,
    )


def answer(engine: Engine, bias: dict[str, float], **more: Any) -> tuple[str, list[Any], Any]:
    """The text, the entries and the last message of an answer to ``a``; tokens are biased."""
    ids = engine.tokenizer.convert_tokens_to_ids
    messages = messages_of(
        engine,
        {"prompt": "a", "max_tokens": 24, "top_logprobs": 2, "temp": 3.0, "seed": 1}
        | {"logit_bias": {ids(token): value for token, value in bias.items()}}
        | more,
    )
    groups = [message for message in messages if message["type"] == "group"]
    entries = [entry for group in groups for entry in group["logprobs"]]
    return "".join(group["text"] for group in groups), entries, messages[-1]


@pytest.mark.parametrize("layout", ["plain", "quadratic"])
@pytest.mark.parametrize("stop", [(), ("ba", "日"), ("nothing",)])
@pytest.mark.parametrize("kind", ["Llama", "byte-level", "Metaspace, first", "Unigram, clean-up"])
def test_the_bytes_of_the_tokens_are_the_text(kind, stop, layout):
    engine = engine_of(kind)
    letters = ["a", "b", "▁", "▁Hello", "日", "<0x20>", "</s>", "Ġ", "Ã©"]
    bias = {token: 40.0 for token in letters if token in engine.tokenizer.get_vocab()}
    for seed in range(3):
        text, entries, last = answer(engine, bias, stop=stop, seed=seed, layout=layout)
        data = b"".join(bytes(entry["bytes"]) for entry in entries)
        assert data.decode() == text
        assert len(entries) == last["stats"]["generation_tokens"]
        offsets, ends = _Offsets(), accumulate(len(entry["token"]) for entry in entries)
        for entry, end in zip(entries, ends, strict=True):
            assert is_utf8(bytes(entry["bytes"]))
            assert offsets.next(entry["bytes"]) == end - len(entry["token"])
            assert text[end - len(entry["token"]) : end] == entry["token"]
            assert len(entry["top_logprobs"]) == 2


def test_tokens_show_their_spaces_and_true_bytes():
    texts = TokenTexts(TokenizerWrapper(make("Llama")))
    ids: Any = make("Llama").convert_tokens_to_ids
    shown = {token: texts.entry(ids(token), -1.0) for token in ("▁Hello", "▁", "<0xC3>", "<0x41>")}
    assert [entry["token"] for entry in shown.values()] == [" Hello", " ", "bytes:\\xc3", "A"]
    assert shown["<0xC3>"]["bytes"] == [0xC3] and shown["▁"]["bytes"] == [0x20]
    beyond = texts.entry(5000, -1.0)
    assert (beyond["token"], beyond["bytes"]) == ("", [])


@pytest.mark.parametrize("layout", ["plain", "quadratic"])
def test_a_stop_string_that_the_limit_completes_is_the_reason(layout):
    """Byte tokens wait for the end of their run, so the text comes with the last token."""
    engine = engine_of("Llama")
    ways: dict[str, Any] = {"stop": ["nowhere", "AAA"], "max_tokens": 4, "layout": layout}
    text, entries, last = answer(engine, {"<0x41>": 99.0, "<0x42>": 97.0}, temp=0.0, **ways)
    assert (text, last["reason"], last["stop_string"]) == ("", "stop", "AAA")
    assert [entry["token"] for entry in entries] == [""] * 4
    byte = engine.tokenizer.convert_tokens_to_ids("<0x41>")
    responses = list(
        stream_generate(MODEL, engine.tokenizer, [5], logits_processors=[_only(byte)], **ways)
    )
    assert [response.finish_reason for response in responses] == [None] * 3 + ["stop"]
    assert "".join(response.text for response in responses) == ""


def _only(token: int) -> Any:
    def processor(tokens: Any, logits: Any) -> Any:
        del tokens
        logits[..., token] += 1e4
        return logits

    return processor


def test_an_offset_is_that_of_the_character():
    offsets = _Offsets()
    tokens = [b"a", " é".encode(), "🙂".encode()[:2], "🙂".encode()[2:], b"", b"b"]
    assert [offsets.next(list(token)) for token in tokens] == [0, 1, 3, 3, 4, 4]


def test_several_tokens_with_one_text_have_a_logprob_each():
    top = [{"token": name, "logprob": -at, "id": 7 + at} for at, name in enumerate(["A", "", "A"])]
    assert _by_token(top) == {"A": 0, "": -1, "token_id:9": -2}
