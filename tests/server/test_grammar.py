"""Answers held to a schema: always valid, and the same with speculation as without."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.grammar import (
    GrammarError,
    Grammars,
    calls_grammar,
    check_in_subprocess,
    json_grammar,
)
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.fixtures_generate import EOS, USER, byte_tokenizer, ids_of
from tests.helpers.tiny import tiny_mtp
from tests.helpers.tokenizers import make
from tests.server.hostile_schemas import EITHER, REFUSED

VOCAB = 272  # more than the tokenizer has
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "catfish", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER)


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return tiny_mtp(vocab_size=VOCAB)


def answer(
    model: MTPModel,
    schema: dict[str, Any],
    *,
    prompt: str = "Who?",
    max_tokens: int = 200,
    **ways: Any,
) -> tuple[list[int], str | None, list[Any]]:
    """The ids of an answer, why it ended and its steps."""
    ids = ids_of(prompt)
    processor = GRAMMARS.processor(json_grammar(schema), num_prompt=len(ids))
    options = {"stop_ids": {EOS}, "seed": 0} | ways
    steps = list(
        decode(model, ids, max_tokens=max_tokens, logits_processors=[processor], **options)
    )
    return [each for step in steps for each in step.tokens], steps[-1].finish_reason, steps


def value_of(ids: list[int]) -> Any:
    """The JSON value of an answer that ended by itself."""
    assert ids[-1] == EOS and max(ids[:-1]) < 256
    return json.loads(bytes(ids[:-1]))


_LEAVES = st.sampled_from(
    [
        {"type": "boolean"}, {"type": "null"}, {"const": "red"}, {"enum": [1, "two", [3]]},
        {"type": "integer", "minimum": -5, "maximum": 120},
        {"type": "string", "maxLength": 4}, {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"type": ["string", "null"], "minLength": 1, "maxLength": 2},
    ]
)  # fmt: skip


def _larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "ab", "b", 'q"uote', "\u00e9"])
    return st.one_of(
        st.builds(
            lambda items, least: {
                "type": "array", "items": items, "minItems": least, "maxItems": least + 1,
            },
            inner,
            st.integers(0, 2),
        ),
        st.builds(
            lambda properties, closed: {
                "type": "object", "properties": properties, "additionalProperties": False,
                "required": list(properties)[: len(properties) if closed else 1],
            },
            st.dictionaries(names, inner, min_size=1, max_size=3),
            st.booleans(),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
    )  # fmt: skip


SCHEMAS = st.recursive(_LEAVES, _larger, max_leaves=4)


@pytest.mark.slow
@given(schema=SCHEMAS, temp=st.sampled_from([0.0, 1.3]), layout=st.sampled_from(["auto", "linear"]))
def test_whatever_the_schema_the_answer_is_valid(model, schema, temp, layout):
    ways = {"sampling": Sampling(temp=temp), "layout": layout, "max_tokens": 120}
    ids, reason, steps = answer(model, schema, **ways)
    assert all(len(step.tokens) <= step.num_draft_tokens + 1 for step in steps)
    if reason == "stop":
        jsonschema.validate(value_of(ids), schema)
    else:
        assert len(ids) == 120 and EOS not in ids


@pytest.mark.parametrize("temp", [0.0, 1.3])
def test_an_answer_is_valid_and_ends(model, temp):
    for prompt in ("Who?", "And you?"):
        ids, reason, _ = answer(model, PERSON, prompt=prompt, sampling=Sampling(temp=temp))
        assert reason == "stop"
        jsonschema.validate(value_of(ids), PERSON)


@pytest.mark.parametrize("layout", ["linear", "quadratic", "auto"])
@pytest.mark.parametrize("lookup", [True, False])
def test_speculation_changes_nothing(model, layout, lookup):
    for prompt in ("Who?", '{"name": "x", "age": 1, "kind": null, "tags": []}'):
        ways = {"prompt": prompt, "max_tokens": 60}
        plain, _, _ = answer(model, PERSON, layout="plain", **ways)
        ids, _, steps = answer(model, PERSON, layout=layout, lookup=lookup, **ways)
        assert ids == plain
        drafted = sum(step.num_draft_tokens for step in steps)
        assert drafted > sum(step.num_accepted for step in steps), "no draft was refused"


@pytest.mark.slow
def test_sampled_ids_follow_the_masked_distribution(model):
    schema, temp, count = {"enum": ["a", "b"]}, 1.3, 100
    logits = next(decode(model, ids_of('Who?"'), max_tokens=1, layout="plain")).logits[0]
    row: Any = logits.tolist()
    one, other = row[ord("a")], row[ord("b")]
    chance = 1 / (1 + math.exp((other - one) / temp))
    assert 0.1 < chance < 0.9
    ways = {"sampling": Sampling(temp=temp), "layout": "quadratic"}
    values = [value_of(answer(model, schema, seed=seed, **ways)[0]) for seed in range(count)]
    deviation = math.sqrt(count * chance * (1 - chance))
    assert abs(values.count("a") - count * chance) < 4 * deviation


def test_masks_do_not_depend_on_the_way_there():
    grammar = json_grammar(PERSON)
    text = ids_of('{"name": "ab", "age": 12, "kind": "cat", "tags": [true]}')
    bent, logits = GRAMMARS.processor(grammar, num_prompt=2), mx.zeros((1, VOCAB))
    rng = np.random.default_rng(0)

    def mask(processor: Any, ids: list[int]) -> list[bool]:
        found: Any = (processor(mx.array([7, 7, *ids]), logits)[0] == 0).tolist()
        return found

    for size in range(len(text) + 1):
        for _ in range(3):  # drafts: right for a while, then anything
            right = int(rng.integers(0, 4))
            draft = [*text[size : size + right], *rng.integers(0, VOCAB, 2).tolist(), EOS, USER]
            for count in range(len(draft) + 1):
                mask(bent, text[:size] + draft[:count])
        fresh = GRAMMARS.processor(grammar, num_prompt=2)
        assert mask(bent, text[:size]) == mask(fresh, text[:size])
    ended = mask(bent, text)
    assert [at for at, may in enumerate(ended) if may] == [EOS]
    assert mask(bent, [*text, EOS]) == ended


def test_white_space_has_an_end():
    processor = GRAMMARS.processor(json_grammar({"type": "object"}), num_prompt=0)
    for text in ("{", '{"a"', '{"a":', '{"a":1', '{"a":1,'):
        for blank in (" ", "\n"):
            ids = ids_of(text + blank)
            row: Any = []
            for _ in range(25):
                row = processor(mx.array(ids), mx.zeros((1, VOCAB)))[0].tolist()
                if row[ord(" ")] != 0:
                    break
                ids.append(ord(" "))
            assert row[ord(" ")] != 0 and row[ord("\n")] != 0 and len(ids) < len(text) + 25


def test_all_ids_that_end_a_text_may_end_it():
    tokenizer = byte_tokenizer()
    tokenizer.add_eos_token("<user>")
    processor = Grammars(tokenizer).processor(json_grammar({"const": 1}), num_prompt=1)
    row: Any = processor(mx.array([0, ord("1")]), mx.zeros((1, VOCAB)))[0].tolist()
    assert [at for at, value in enumerate(row) if value == 0] == [EOS, USER]


def test_half_precision_stays(model):
    del model
    processor = GRAMMARS.processor(json_grammar({"const": 1}), num_prompt=0)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        row = processor(mx.array([], mx.int32), mx.zeros((1, VOCAB), dtype))
        assert row.dtype == dtype and mx.isfinite(row).sum().item() == 1


def test_a_text_that_no_token_can_go_on_with_is_an_error():
    processor = GRAMMARS.processor(json_grammar({"const": "long"}), num_prompt=0)
    with pytest.raises(GrammarError, match="no token"):
        processor(mx.array(ids_of('"')), mx.zeros((1, 50)))  # a model of 50 ids


@pytest.mark.parametrize("name", ["no such type", "settings", "five megabytes", "look-ahead"])
def test_bad_schemas_are_named_in_a_line(name):
    with pytest.raises(ValueError) as told:
        GRAMMARS.processor(json_grammar(REFUSED[name]), num_prompt=0)
    assert "\n" not in str(told.value) and 5 < len(str(told.value)) < 400


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a chain of unions", "many at once"])  # the rest: the server's
def test_hostile_schemas_are_refused_in_time(name):
    began = time.monotonic()
    with pytest.raises(ValueError):
        check_in_subprocess(json_grammar(REFUSED[name]))
    assert time.monotonic() - began < 25


@pytest.mark.slow
@pytest.mark.parametrize("name", EITHER)
def test_large_answers_are_begun_and_cut(model, name):
    try:
        ids, reason, _ = answer(model, EITHER[name], max_tokens=40)
    except ValueError as error:  # before the answer or in its midst
        assert "\n" not in str(error)
        return
    assert len(ids) == 40 or reason == "stop"


def test_a_schema_is_tried_once(monkeypatch):
    grammars, tried = Grammars(TOKENIZER), []
    monkeypatch.setattr("mlx_mtp.apps.engine.grammar.check_in_subprocess", tried.append)
    for schema in ({"const": 1}, {"const": 2}, {"const": 1}):
        grammars.processor(json_grammar(schema), num_prompt=0)
    assert len(tried) == 2


def test_without_llguidance_a_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"the package llguidance is missing: pip install"):
        json_grammar({"type": "object"})


ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
MARKS = ("<tool_call>", "</tool_call>")


@pytest.mark.parametrize("many", [True, False])
def test_calls_are_held_to_their_schemas(model, many):
    grammar = calls_grammar({"add": ADD, 'say "\u00e9"': {}}, tags=MARKS, parallel=many)
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b":2}}\n</tool_call>'
    other = '<tool_call>{"name": "say \\"\u00e9\\"", "arguments": {"x": [1]}}</tool_call>'
    wrong = [
        "Hello", one.replace("1", "10"), one.replace("add", "sub"), one.replace('"a": 1, ', ""),
        one.replace(', "arg', ',  "arg'), '<tool_call>{"name": "add"}</tool_call>',
    ]  # fmt: skip
    right = [one, other] + ([f"{one}\n{other}", one + one] if many else [])
    for text in [*right, *wrong] + ([] if many else [one + one]):
        processor = GRAMMARS.processor(grammar, num_prompt=0)
        ids, held = [*ids_of(text), EOS], True
        for at, token in enumerate(ids):
            row: Any = processor(mx.array(ids[:at], mx.int32), mx.zeros((1, VOCAB)))[0].tolist()
            held = held and row[token] == 0
            if not held:
                break
        assert held == (text in right), text


def test_calls_know_no_settings():
    with pytest.raises(ValueError, match="x-guidance"):
        calls_grammar({"add": {"x-guidance": {}}}, tags=MARKS, parallel=False)


def test_ids_without_a_token_are_never_allowed():
    tokenizer = TokenizerWrapper(make("Llama, holes"))
    processor = Grammars(tokenizer).processor(json_grammar({"type": "string"}), num_prompt=0)
    answer = tokenizer.convert_tokens_to_ids(["<0x22>", "a"])
    row: Any = processor(mx.array(answer), mx.zeros((1, 1200)))[0].tolist()
    allowed = [index for index, value in enumerate(row) if value == 0]
    assert allowed and all(tokenizer.convert_ids_to_tokens(index) for index in allowed)
