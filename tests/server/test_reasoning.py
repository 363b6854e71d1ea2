"""Reasoning in the engine and in the replies of every API."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.preparing import prepare
from mlx_mtp.apps.engine.protocol import Job
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.calibration.stored_costs import speculation_for
from tests.helpers.fixtures_generate import reasoning_tokenizer
from tests.helpers.tiny import tiny_mtp
from tests.server.sessions import messages_of
from tests.server.test_engine import Turns, job

VOCAB = 264
BUDGET = 5
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[True, False])
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine whose marks are single tokens, or several."""
    model = tiny_mtp(vocab_size=VOCAB, max_position_embeddings=512)
    tokenizer = reasoning_tokenizer(single=request.param)
    return Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=speculation_for(model),
        prefixes=PrefixCache(max_bytes=0),
        texts=TokenTexts(tokenizer),
        prefill_step_size=64,
    )


def joined(messages: list[dict[str, Any]], name: str) -> str:
    return "".join(message.get(name) or "" for message in messages)


def ids_of_groups(messages: list[dict[str, Any]]) -> list[int]:
    return [token for message in messages for token in message.get("ids", ())]


def ask(engine: Engine, text: str = "hi", **more: Any) -> list[dict[str, Any]]:
    more = {"thinking_budget": BUDGET, "pieces": True, "layout": "quadratic"} | more
    return messages_of(engine, job(text, **more))


def test_reasoning_is_split_off_and_counted(engine):
    messages = ask(engine)
    raw = "".join("".join(message.get("pieces", ())) for message in messages)
    span = [message["span"] for message in messages if message.get("span")][-1]
    assert joined(messages, "reasoning") == raw[span[1] : span[2]]
    assert joined(messages, "text") == raw[span[3] :]
    assert raw[span[2] : span[3]].strip() == "</think>"
    assert messages[-1]["reasoning_tokens"] == BUDGET
    whole = ask(engine, split_reasoning=False)
    assert joined(whole, "text") == raw and whole[-1]["reasoning_tokens"] == 0


def test_without_reasoning_the_text_is_the_answer(engine):
    messages = ask(engine, enable_thinking=False)
    assert not joined(messages, "reasoning") and joined(messages, "text")
    assert messages[-1]["reasoning_tokens"] == 0


def test_batched_answers_keep_to_their_own_budgets(engine):
    budgets = [None, 0, 3, 7]
    turns = Turns(engine)
    jobs = [job("hi", thinking_budget=budget, pieces=True) for budget in budgets]
    for number, values in enumerate(jobs):
        turns.submit(number, values | {"layout": "quadratic"})
    turns.wait_until_prepared(len(jobs))
    turns.run(len(jobs))
    for number, values in enumerate(jobs):
        plain = messages_of(engine, values | {"layout": "plain"})
        assert ids_of_groups(turns.of(number)) == ids_of_groups(plain)
        budget = budgets[number]
        assert turns.of(number)[-1]["reasoning_tokens"] == (budget if budget is not None else 24)


@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}, {"temp": 1.0, "seed": 1}])
def test_a_schema_applies_after_the_reasoning(engine, more):
    answers = [
        ask(engine, schema=PERSON, max_tokens=80, layout=layout, **more)
        for layout in ("plain", "quadratic")
    ]
    for messages in answers:
        assert messages[-1]["reason"] == "stop"
        assert json.loads(joined(messages, "text")).keys() == {"name", "old"}
        assert bool(joined(messages, "reasoning")) == (more.get("enable_thinking") is None)
    if "temp" not in more:
        assert ids_of_groups(answers[0]) == ids_of_groups(answers[1])


def test_a_schema_allows_the_model_to_open_the_reasoning_first(engine):
    tokenizer = reasoning_tokenizer(template="{{ messages[0]['content'] }}")
    opening = tokenizer.encode("<think>")
    engine = replace(engine, tokenizer=tokenizer)
    ways: Any = {"schema": PERSON, "max_tokens": 80}
    messages = ask(engine, logit_bias={opening[0]: 50.0}, **ways)
    assert messages[-1]["reasoning_tokens"] == BUDGET
    json.loads(joined(messages, "text"))
    messages = ask(engine, logit_bias={opening[0]: -50.0}, **ways)
    assert not joined(messages, "reasoning") and json.loads(joined(messages, "text"))


def test_a_prefilled_answer_is_not_reasoning(engine):
    def phase_of(content: str) -> str | None:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
        prepared = prepare(Job(max_tokens=4, messages=turns), engine.model, engine.tokenizer)
        return prepared.reasoning and prepared.reasoning.phase

    assert phase_of("Well, ") == "after"
    assert phase_of("<think>Hm, ") == "inside"
