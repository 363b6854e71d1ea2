"""``response_format`` and ``text.format``: what is refused, and real answers to real clients."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal, cast

import jsonschema
import openai
import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from pydantic import BaseModel, Field

from mlx_mtp.apps.engine.grammar import GrammarError
from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.preparing import Prepared, Refusal, prepare
from mlx_mtp.apps.engine.protocol import (
    Finished,
    Job,
    JobMessage,
    Refused,
    Started,
    Submit,
)
from mlx_mtp.apps.engine.scheduler import Scheduler
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.apps.engine.tool_calls import ToolCallReader, calls_are_json
from mlx_mtp.apps.server.api.anthropic_schema import openai_choice
from mlx_mtp.apps.server.api.tools import Tool, chat_tools
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.model.caches.blocks import CacheBlocks
from mlx_mtp.planning.auto import Speculation
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, tiny_mtp
from tests.server.command import Served, served
from tests.server.host import PATHS, Host, hosted
from tests.server.hostile_schemas import EITHER, REFUSED
from tests.server.sessions import messages_of

TEXT = "Who are you?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


class Pet(BaseModel):
    """What clients want to know."""

    name: str = Field(max_length=5)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)
    tame: bool | None


def wanted(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    """OpenAI's ``response_format`` for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema} | more}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted() as running:
        running.wait_for("ok")
        yield running


@pytest.mark.parametrize(
    ("path", "format", "param"),
    [
        ("chat/completions", {"type": "yaml"}, "response_format.type"),
        ("chat/completions", {"type": "json_schema"}, "response_format.json_schema.schema"),
        (
            "chat/completions",
            {"type": "json_schema", "json_schema": {"name": "a"}},
            "response_format.json_schema.schema",
        ),
        ("chat/completions", wanted(True), "response_format.json_schema.schema"),  # type: ignore[arg-type]
        ("responses", {"type": "json_schema", "name": "a"}, "text.format.schema"),
    ],
)
def test_formats_that_make_no_sense_are_named(host, path, format, param):
    given = {"text": {"format": format}} if path == "responses" else {"response_format": format}
    reply = host.client.post(f"/v1/{path}", json=PATHS[f"/v1/{path}"] | given)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and param in error["message"] and "\n" not in error["message"]


def test_the_format_is_told_in_responses(host):
    format = {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": True}
    body = {"input": "hello", "text": {"format": format}}
    assert host.client.post("/v1/responses", json=body).json()["text"]["format"] == format
    body = {"input": "hello"}
    assert host.client.post("/v1/responses", json=body).json()["text"]["format"] == {"type": "text"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("formats"), "--max-tokens", "200") as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_openai_chat_parses(client, temperature):
    ask: Any = [{"role": "user", "content": TEXT}]
    ways: Any = {"model": "tiny", "messages": ask, "response_format": Pet, "seed": 3}
    reply = client.chat.completions.parse(temperature=temperature, **ways)
    assert isinstance(reply.choices[0].message.parsed, Pet)
    with client.chat.completions.stream(temperature=temperature, **ways) as stream:
        final = stream.get_final_completion()
    if temperature == 0:
        assert final.choices[0].message.parsed == reply.choices[0].message.parsed
    assert isinstance(final.choices[0].message.parsed, Pet)


@pytest.mark.slow
def test_openai_responses_parse(client):
    ways: Any = {"model": "tiny", "input": TEXT, "text_format": Pet}
    reply = client.responses.parse(**ways)
    assert isinstance(reply.output_parsed, Pet)
    with client.responses.stream(**ways) as stream:
        assert stream.get_final_response().output_parsed == reply.output_parsed


@pytest.mark.slow
def test_speculation_does_not_change_it_and_a_cut_is_told(server):
    ways: dict[str, Any] = {"response_format": wanted(SCHEMA)}
    plain, fast = (server.chat(TEXT, mtp=mtp, **ways).json()["choices"][0] for mtp in (False, True))
    assert plain == fast and plain["finish_reason"] == "stop"
    jsonschema.validate(json.loads(fast["message"]["content"]), SCHEMA)
    cut = server.chat(TEXT, max_tokens=3, **ways).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert plain["message"]["content"].startswith(cut["message"]["content"])
    opened = server.chat(TEXT, max_tokens=9, response_format={"type": "json_object"}).json()
    assert opened["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.slow
def test_formats_go_with_what_else_may_be_asked(server):
    ways: dict[str, Any] = {
        "n": 2, "temperature": 1.0, "seed": 4, "frequency_penalty": 1.0, "presence_penalty": 0.5,
        "logit_bias": {"34": -50, "65": 100}, "repetition_penalty": 1.1, "logprobs": True,
        "top_logprobs": 3, "top_p": 0.9, "top_k": 5, "response_format": wanted(SCHEMA),
    }  # fmt: skip
    reply = server.chat(TEXT, **ways)
    for choice in reply.json()["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert all(entry["logprob"] > -100 for entry in choice["logprobs"]["content"])
    stopped = server.chat(TEXT, stop=["ok"], response_format=wanted(SCHEMA)).json()["choices"][0]
    assert stopped["finish_reason"] == "stop" and "ok" not in stopped["message"]["content"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_hostile_schemas_leave_the_engine_alive(server):
    engine = server.engine_pid
    for name, schema in (REFUSED | EITHER).items():
        reply = server.chat(TEXT, max_tokens=20, response_format=wanted(schema))
        assert reply.status_code in ((400,) if name in REFUSED else (200, 400)), (name, reply.text)
        if reply.status_code == 400 and name in REFUSED:
            error = reply.json()["error"]
            by_body = "more than" in error["message"] and error["param"] is None  # its size alone
            assert by_body or error["param"] == "response_format.json_schema.schema", name
        assert reply.elapsed.total_seconds() < 40, name
    assert server.engine_pid == engine and server.chat("hi", max_tokens=2).status_code == 200


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "is_it", "parameters": SCHEMA, "strict": True}},
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    plain, detokenizer = byte_tokenizer(), cast(Any, BPEStreamingDetokenizer)
    tokenizer = TokenizerWrapper(
        plain._tokenizer, detokenizer, tool_parser=json_tools.parse_tool_call,
        tool_call_start="<tool_call>", tool_call_end="</tool_call>",
    )  # fmt: skip
    model = tiny_mtp(vocab_size=BYTE_VOCAB, max_position_embeddings=1024)
    return Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=Speculation.guess(model.num_draft_tokens),
        prefixes=PrefixCache(CacheBlocks(model, chunk_size=8), max_bytes=0),
        texts=TokenTexts(tokenizer),
        prefill_step_size=64,
    )


@pytest.mark.parametrize("names", [["add"], ["is_it", "add"]])
def test_calls_that_must_be_made_are_made(engine, names):
    assert calls_are_json(engine.tokenizer)
    job = {
        "messages": [{"role": "user", "content": TEXT}], "max_tokens": 200, "tools": TOOLS,
        "required_tools": names, "parallel_tool_calls": False,
    }  # fmt: skip
    *_, last = messages_of(engine, job)
    assert last["reason"] == "tool_calls" and len(last["tool_calls"]) == 1
    call = last["tool_calls"][0]
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
    assert call["name"] in names
    jsonschema.validate(json.loads(call["arguments"]), schemas[call["name"]])


@pytest.mark.parametrize("form", [{}, {"required_tools": ["add"]}])
@pytest.mark.parametrize("start", ["{", "<"])
def test_with_tools_and_a_schema_the_answer_is_json_or_calls(engine, start, form):
    other = {"{": "<", "<": "{"}[start]
    job = {
        "messages": [{"role": "user", "content": TEXT}], "max_tokens": 200, "tools": TOOLS,
        "schema": SCHEMA, "logit_bias": {engine.tokenizer.encode(other)[0]: -100}, **form,
    }  # fmt: skip
    *groups, last = messages_of(engine, job)
    is_call = start == "<" or bool(form)
    assert bool(last["tool_calls"]) == is_call
    if not is_call:
        text = "".join(group.get("text", "") for group in groups)
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("several", [True, False])
def test_only_the_first_call_counts_without_parallel_calls(engine, several, monkeypatch):
    calls = [{"name": "add", "arguments": f'{{"a": {number}}}'} for number in (1, 2)]
    monkeypatch.setattr(ToolCallReader, "finish", lambda self: self.calls.extend(calls) or "")
    job = {
        "messages": [{"role": "user", "content": TEXT}], "max_tokens": 2, "tools": TOOLS,
        "parallel_tool_calls": several,
    }  # fmt: skip
    *_, last = messages_of(engine, job)
    assert last["tool_calls"] == (calls if several else calls[:1])


def test_a_bad_schema_of_a_tool_is_refused(engine):
    tool = {"type": "function", "function": {"name": "add", "parameters": REFUSED["no such type"]}}
    job = {
        "messages": [{"role": "user", "content": TEXT}], "max_tokens": 9, "tools": [tool],
        "required_tools": ["add"], "parallel_tool_calls": True,
    }  # fmt: skip
    with pytest.raises(Refusal, match="tools: ") as told:
        prepare(Job.from_dict(job), engine.model, engine.tokenizer)
    assert told.value.param == "tools"


@pytest.mark.parametrize(
    ("choice", "names", "many"),
    [
        ("required", ["is_it", "add"], True),
        ("any", ["is_it", "add"], True),
        ("add", ["add"], False),
        ({"type": "function", "function": {"name": "add"}}, ["add"], False),
        ({"type": "function", "name": "is_it"}, ["is_it"], False),
        (openai_choice({"type": "any"})[0], ["is_it", "add"], True),
        (openai_choice({"type": "tool", "name": "add"})[0], ["add"], False),
    ],
)
def test_choices_of_all_dialects_become_calls(choice, names, many):
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    job = chat_tools(tools, choice)
    assert (job["required_tools"], job["parallel_tool_calls"]) == (names, many)
    assert len(job["tools"]) == 2
    assert not chat_tools(tools, choice, parallel=False)["parallel_tool_calls"]


@pytest.mark.parametrize(
    "choice", [{}, {"type": "function"}, {"type": "function", "name": "mul"}, "sometimes", 
               {"type": "function", "function": 3}, openai_choice({"type": "tool"})[0]]
)  # fmt: skip
def test_choices_that_name_no_tool_are_refused(choice):
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    with pytest.raises(ApiError, match="tool_choice must be"):
        chat_tools(tools, choice)


def test_strict_tools_are_passed_on_whether_or_not_a_call_is_required():
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    for choice in ("auto", "required"):
        fields = chat_tools(tools, choice)
        assert "strict" in fields["tools"][0]["function"]


def test_a_grammar_that_leads_nowhere_is_told_and_harms_no_other():
    class Answer:
        finished = True

        def __init__(self, prepared: Any) -> None:
            self.ids = prepared.ids

        def started(self) -> Started:
            return Started(prompt_tokens=1, cached_tokens=0)

        def plan(self) -> Any:
            return object()

        def commit(self, outcome: Any) -> list[JobMessage]:
            if self.ids == [1]:
                raise GrammarError("no way on")
            return [Finished(reason="stop")]

        def close(self) -> None:
            pass

    sent: list[JobMessage] = []
    scheduler = Scheduler(
        prepare=lambda job: Prepared(ids=job["ids"]),
        begin=Answer,
        group=lambda steps: [list(range(len(steps)))],
        run=lambda steps: cast(Any, steps),
        send=sent.append,
    )
    for number in (1, 2):
        scheduler.receive(Submit(id=number, job={"ids": [number]}))
    while len(sent) < 4:
        scheduler.turn()
    assert Refused(id=1, message="no way on", code="grammar") in sent
    assert Finished(id=2, reason="stop") in sent
