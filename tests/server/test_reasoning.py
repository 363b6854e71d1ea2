"""Reasoning in the engine and in the replies of every API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.preparing import prepare, template_config
from mlx_mtp.apps.engine.protocol import Job
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.calibration.stored_costs import speculation_for
from mlx_mtp.model.caches.blocks import CacheBlocks
from tests.helpers.fixtures_generate import reasoning_tokenizer
from tests.helpers.tiny import tiny_mtp
from tests.server.host import Host, hosted
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
        prefixes=PrefixCache(CacheBlocks(model, chunk_size=64), max_bytes=0),
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


def test_a_request_overrides_the_arguments_of_the_operator(engine):
    defaults = {"enable_thinking": False, "more": 1}

    def config(**fields: Any) -> dict[str, Any]:
        made = Job(max_tokens=4, messages=[], **fields)
        return template_config(made, engine.tokenizer, defaults)

    assert config() == defaults
    assert config(enable_thinking=True)["enable_thinking"] is True
    assert config(template_config={"enable_thinking": True})["enable_thinking"] is True


def test_a_prefilled_answer_is_not_reasoning(engine):
    def phase_of(content: str) -> str | None:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
        prepared = prepare(Job(max_tokens=4, messages=turns), engine.model, engine.tokenizer)
        return prepared.reasoning and prepared.reasoning.phase

    assert phase_of("Well, ") == "after"
    assert phase_of("<think>Hm, ") == "inside"


# --- replies, over the fake engine -----------------------------------------------------------

THINK: Any = [{"role": "user", "content": "think let me see|hello"}]
THINK_CALL: Any = [{"role": "user", "content": "think let me see|call"}]
SHOW: Any = [{"role": "user", "content": "job"}]
ADD: dict[str, Any] = {"name": "add", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted(thinking_budget=77) as running:
        running.wait_for("ok")
        yield running


@pytest.mark.parametrize("details", [False, True])
def test_chat_has_reasoning_content(client, details):
    ways: Any = {"model": "m", "messages": THINK, "extra_body": {"mtp": {"details": details}}}
    reply = client.chat.completions.create(**ways)
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("let me see", "hello")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 10
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **ways)
    ]
    pieces = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert [piece for piece in pieces if piece] == ["let", " me", " se", "e"]
    assert "".join(delta.content or "" for delta in deltas) == "hello"
    again = [*THINK, message, {"role": "user", "content": "job"}]
    sent = json.loads(client.chat.completions.create(model="m", messages=again, max_tokens=9999)
                      .choices[0].message.content)  # fmt: skip
    assert sent["messages"][1]["reasoning_content"] == "let me see"
    with client.chat.completions.stream(model="m", messages=THINK) as stream:
        assert stream.get_final_completion().choices[0].message.content == "hello"


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("summary", ["none", "auto"])
def test_responses_have_a_reasoning_item(client, details, summary):
    more: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "tools": [
        {"type": "function", "strict": None, **ADD}], "reasoning": {"summary": summary},
        "extra_body": {"mtp": {"details": details}}}  # fmt: skip
    for text, kinds in (
        (THINK, ["reasoning", "message"]),
        (THINK_CALL, ["reasoning", "function_call"]),
    ):
        whole = client.responses.create(model="m", input=text, **more)
        with client.responses.stream(model="m", input=text, **more) as stream:
            events = list(stream)
            final = stream.get_final_response()
        for response in (whole, final):
            assert [item.type for item in response.output] == kinds
            item = response.output[0]
            assert item.content[0].text == "let me see" and item.status == "completed"
            assert [part.text for part in item.summary] == (
                ["let me see"] if summary == "auto" else []
            )
            assert response.usage.output_tokens_details.reasoning_tokens == 10
        assert (
            "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
            == "let me see"
        )
        seen = [e.delta for e in events if e.type == "response.reasoning_summary_text.delta"]
        assert "".join(seen) == ("let me see" if summary == "auto" else "")
        assert [e.sequence_number for e in events if hasattr(e, "sequence_number")] == sorted(
            {e.sequence_number for e in events if hasattr(e, "sequence_number")}
        )
    for hidden in ({"content": None}, {"content": None, "summary": []}):
        item = whole.output[0].model_dump() | hidden
        output = {"type": "function_call_output", "call_id": whole.output[1].call_id, "output": "2"}
        turns: Any = [*text, item, whole.output[1], output, *SHOW]
        sent = client.responses.create(model="m", input=turns, max_output_tokens=9999)
        assistant = json.loads(sent.output_text)["messages"][1]
        assert assistant["reasoning_content"] == "let me see" and assistant["tool_calls"]


@pytest.mark.parametrize("details", [False, True])
def test_messages_have_a_thinking_block(claude, details):
    tools: Any = [{"name": "add", "input_schema": {"type": "object"}}]
    ways: Any = {"model": "m", "max_tokens": 9999, "tools": tools}
    ways["extra_body"] = {"mtp": {"details": details}}
    for text, kinds in ((THINK, ["thinking", "text"]), (THINK_CALL, ["thinking", "tool_use"])):
        whole = claude.messages.create(messages=text, **ways)
        with claude.messages.stream(messages=text, **ways) as stream:
            events = list(stream)
            final = stream.get_final_message()
        for message in (whole, final):
            assert [block.type for block in message.content] == kinds
            assert message.content[0].thinking == "let me see"
        assert whole.content[0].signature == final.content[0].signature != ""
        pieces = [e.thinking for e in events if e.type == "thinking" and e.thinking]
        assert pieces == ["let", " me", " se", "e"]
    result = {"type": "tool_result", "tool_use_id": whole.content[1].id, "content": "2"}
    turns: Any = [*text, {"role": "assistant", "content": final.content}]
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "job"}]})
    sent = json.loads(claude.messages.create(messages=turns, **ways).content[0].text)
    assert sent["messages"][1]["reasoning_content"] == "let me see"


def test_thinking_may_be_omitted_and_comes_back(claude):
    tools: Any = [{"name": "add", "input_schema": {"type": "object"}}]
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    ways: Any = {"model": "m", "max_tokens": 9999, "tools": tools, "thinking": thinking}
    whole = claude.messages.create(messages=THINK_CALL, **ways)
    with claude.messages.stream(messages=THINK_CALL, **ways) as stream:
        deltas = [e.delta.type for e in stream if e.type == "content_block_delta"]
        final = stream.get_final_message()
    assert deltas == ["signature_delta", "input_json_delta"]
    for message in (whole, final):
        block, call = message.content
        assert (block.type, block.thinking) == ("thinking", "") and block.signature
        assert "let me see" not in message.model_dump_json()
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
        turns: Any = [*THINK_CALL, {"role": "assistant", "content": message.content}]
        turns.append({"role": "user", "content": [result, {"type": "text", "text": "job"}]})
        sent = json.loads(claude.messages.create(messages=turns, **ways).content[0].text)
        assert sent["messages"][1]["reasoning_content"] == "let me see"


def test_a_stop_string_after_a_call_leaves_the_call_to_be_run(claude):
    tools: Any = [{"name": "add", "input_schema": {"type": "object"}}]
    message = claude.messages.create(
        model="m", messages=THINK_CALL, max_tokens=99, tools=tools, stop_sequences=["</tool_call>"]
    )
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)


def test_reasoning_may_be_all_there_is(client, claude):
    only: Any = [{"role": "user", "content": "think on and on|"}]
    message = client.chat.completions.create(model="m", messages=only).choices[0].message
    assert (message.reasoning_content, message.content) == ("on and on", "")
    assert [item.type for item in client.responses.create(model="m", input=only).output] == [
        "reasoning"
    ]
    content = claude.messages.create(model="m", messages=only, max_tokens=99).content
    assert [block.type for block in content] == ["thinking"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("chat/completions", {}, {"thinking_budget": 77}),
        ("chat/completions", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("chat/completions", {"reasoning": {"effort": "high", "max_tokens": 9}},
         {"reasoning_effort": "high", "thinking_budget": 9}),
        ("chat/completions", {"enable_thinking": False}, {"enable_thinking": False}),
        ("chat/completions", {"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ("chat/completions", {"thinking_budget": -1}, {"thinking_budget": None}),
        ("chat/completions", {"reasoning_format": "none"}, {"split_reasoning": False}),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": False}},
         {"template_config": {"enable_thinking": False}}),
        ("responses", {"reasoning": {"effort": "medium"}}, {"reasoning_effort": "medium"}),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}},
         {"enable_thinking": True, "thinking_budget": 1024}),
        ("messages", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
         {"enable_thinking": True, "reasoning_effort": "high", "thinking_budget": None}),
        ("messages", {"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
    ],
)  # fmt: skip
def test_requests_set_reasoning(host, path, body, expected):
    name = "input" if path == "responses" else "messages"
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    reply = host.client.post(f"/v1/{path}", json={name: SHOW, limit: 9999} | body).json()
    if path == "chat/completions":
        text = reply["choices"][0]["message"]["content"]
    else:
        content = reply["content"] if path == "messages" else reply["output"][0]["content"]
        text = content[0]["text"]
    sent = json.loads(text)
    assert {name: sent.get(name) for name in expected} == expected
