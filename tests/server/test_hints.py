"""What requests may contain that does not change the answer: hints, nulls, tools of other kinds."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import Job, Ready
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.api.schemas import MAX_TOKENS
from mlx_mtp.apps.server.app import create_app
from mlx_mtp.apps.server.errors import engine_down
from mlx_mtp.apps.server.settings import Settings
from tests.server.client_forms import FORMS
from tests.server.fake_engine import READY
from tests.server.host import PATHS, Host, hosted

CHAT, TEXT, RESPONSES, MESSAGES = PATHS
EMPTY: dict[str, Any] = {"type": "object", "properties": {}}
NOW: dict[str, Any] = {"name": "now", "parameters": EMPTY}
USER = {"role": "user", "content": "hi"}


TEXTS = re.compile(r'"(?:content|delta|text)":"([^"]+)"')  # in pieces of a stream, or whole


def function(**more: Any) -> dict[str, Any]:
    """A function of OpenAI's chat."""
    return {"type": "function", "function": NOW | more}


def called(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    """A call of OpenAI's chat."""
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": "now", "arguments": arguments},
    } | more


class Recorder(Engine):
    """An engine that keeps what it is asked and answers nothing."""

    jobs: Sequence[Job] = ()

    def submit(self, jobs: Sequence[Job]) -> Batch:
        self.jobs = jobs
        raise engine_down("recorded")


RECORDER = Recorder({})
_READY: dict[str, Any] = READY
RECORDER.info = Ready(**_READY)
CLIENT = TestClient(create_app(RECORDER, Settings()), base_url="http://localhost")


def sent(path: str, body: dict[str, Any]) -> Any:
    """The reply to a body, to which the fields of a short one are added."""
    data = json.dumps(PATHS[path] | body)  # in ASCII, so that there may be lone surrogates
    return CLIENT.post(path, content=data, headers={"content-type": "application/json"})


def job_of(path: str, body: dict[str, Any]) -> Job:
    """What a request becomes."""
    reply = sent(path, body)
    assert reply.status_code == 503, reply.text
    return RECORDER.jobs[0]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted() as running:
        running.wait_for("ok")
        yield running


NOTHING: list[tuple[str, dict[str, Any]]] = [
    (path, fields)
    for path in PATHS
    for fields in (
        {"temperature": None, "top_k": None, "mtp": None, "model": None, "stop": None},
        {"model": "gpt-9"},
        {"top_k": -1, "repetition_penalty": 0.0, "logit_bias": {}, "frequency_penalty": 0},
        {"user": "u", "service_tier": "auto", "metadata": {"user_id": "u"}, "store": False},
        {"draft_model": "default_model", "num_draft_tokens": 3, "xtc_probability": 0.0},
        {"cache_prompt": True, "id_slot": -1, "samplers": ["top_k"], "typical_p": 1.0},
    )
] + [
    (CHAT, {"functions": None, "reasoning_effort": None, "audio": None}),
    (CHAT, {"web_search_options": {}, "functions": [], "modalities": ["text"]}),
    (CHAT, {"top_logprobs": -1, "logprobs": False, "n": 1.0}),
    (CHAT, {"stream_options": {"include_usage": True, "chunk_include_usage": True}}),
    (CHAT, {"parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"}}),
    (CHAT, {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low"}),
    (CHAT, {"response_format": {"type": "text"}, "tool_choice": "auto", "tools": []}),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "patch"}}]}),
    (TEXT, {"echo": False, "best_of": 1, "suffix": "", "logprobs": None}),
    (TEXT, {"logprobs": False}),
    (RESPONSES, {"reasoning": None, "tools": [], "tool_choice": "auto"}),
    (RESPONSES, {"include": ["reasoning.encrypted_content"], "client_metadata": {"a": "b"}}),
    (RESPONSES, {"truncation": "auto", "stream_options": {"include_obfuscation": False}}),
    (RESPONSES, {"text": {"verbosity": "low"}, "prompt_cache_key": "k", "background": False}),
    (RESPONSES, {"text": {"format": {"type": "text"}}, "max_tool_calls": 4}),
    (RESPONSES, {"tools": [{"type": "web_search", "external_web_access": False}]}),
    (RESPONSES, {"tools": [{"type": "local_shell"}, {"type": "custom", "name": "patch"}]}),
    (RESPONSES, {"tools": [{"type": "mcp", "server_label": "m", "server_url": "http://m"}]}),
    (MESSAGES, {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}),
    (MESSAGES, {"output_config": {}, "mcp_servers": [], "container": None, "betas": ["x"]}),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]}),
    (MESSAGES, {"tools": [{"type": "bash_20250124", "name": "bash"}], "cache_control": None}),
    (MESSAGES, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields"), NOTHING)
def test_hints_do_not_change_what_is_asked(path, fields):
    assert job_of(path, fields) == job_of(path, {})


BECOMES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (CHAT, {"max_tokens": -1}, {"max_tokens": MAX_TOKENS}),
    (CHAT, {"max_tokens": 20.0}, {"max_tokens": 20}),
    (CHAT, {"max_tokens": 7, "max_completion_tokens": 7}, {"max_tokens": 7}),
    (CHAT, {"max_tokens": None, "max_completion_tokens": 7}, {"max_tokens": 7}),
    (TEXT, {"max_tokens": -1}, {"max_tokens": MAX_TOKENS}),
    (RESPONSES, {"max_output_tokens": -1}, {"max_tokens": MAX_TOKENS}),
    (MESSAGES, {"max_tokens": 9.0}, {"max_tokens": 9}),
    (CHAT, {"temperature": "0.5", "max_tokens": "9", "seed": "5.0", "top_k": 4.0},
     {"temp": 0.5, "max_tokens": 9, "seed": 5, "top_k": 4}),
    (MESSAGES, {"max_tokens": "9"}, {"max_tokens": 9}),
    (CHAT, {"seed": 2**64 + 1}, {"seed": 1}),
    (CHAT, {"response_format": {}, "logit_bias": {"5": "2"}}, {"logit_bias": {5: 2}}),
    (RESPONSES, {"reasoning": "high", "tools": [NOW]},
     {"reasoning_effort": "high", "tools": [function()]}),
    (CHAT, {"stop": ["a", ""]}, {"stop": ["a"]}),
    (MESSAGES, {"stop_sequences": ["", "a"]}, {"stop": ["a"]}),
    (CHAT, {"thinking": False}, {"enable_thinking": False}),
    (MESSAGES, {"thinking": {"type": "auto"}}, {"enable_thinking": True}),
    (CHAT, {"reasoning": "high"}, {"reasoning_effort": "high"}),
    (CHAT, {"tools": [function()], "parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    (MESSAGES, {"tools": [{"name": "now", "input_schema": EMPTY}],
                "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
     {"parallel_tool_calls": False}),
    (CHAT, {"tools": [function()], "tool_choice": "any"}, {"required_tools": ["now"]}),
    (CHAT, {"tools": [function()], "tool_choice": "now"}, {"required_tools": ["now"]}),
    (RESPONSES, {"tools": [function()]}, {"tools": [function()]}),
    (CHAT, {"tools": [function()], "response_format": {"type": "json_object"}},
     {"tools": [function()], "schema": {"type": "object"}}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": EMPTY}}}, {"schema": EMPTY}),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": EMPTY}}},
     {"schema": EMPTY}),
    (TEXT, {"logprobs": True}, {"top_logprobs": 0}),
    (TEXT, {"seed": 5.0, "temperature": 1}, {"seed": 5, "temp": 1}),
    (TEXT, {"logit_bias": [[5, 2], [6, False]]}, {"logit_bias": {5: 2, 6: -100}}),
    (TEXT, {"repetition_penalty": 1.5, "repetition_context_size": 0},
     {"repetition_penalty": 1.5, "repetition_context_size": MAX_TOKENS}),
    (CHAT, {"xtc_probability": 0.5, "xtc_threshold": 1.0},
     {"xtc_probability": 0.5, "xtc_threshold": 0.5}),
    (RESPONSES, {"stop": "x", "presence_penalty": 1}, {"stop": ["x"], "presence_penalty": 1}),
    (CHAT, {"response_format": {"type": "json_object", "schema": EMPTY}}, {"schema": EMPTY}),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": EMPTY}}},
     {"schema": EMPTY, "schema_param": "output_config.format.schema"}),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": EMPTY}}, {"schema": EMPTY}),
    (CHAT, {"tools": [function(strict=True)]}, {"tools": [function(strict=True)]}),
    (CHAT, {"tools": [{"type": "custom", "custom": {}}, function()]}, {"tools": [function()]}),
    (RESPONSES, {"tools": [{"type": "function", **NOW}, {"type": "image_generation"}]},
     {"tools": [function()]}),
    (RESPONSES, {"tools": [{"type": "namespace", "name": "mcp__a", "tools": [
        {"type": "function", **NOW}, {"type": "custom", "name": "b"}]}]},
     {"tools": [function(name="mcp__a__now")]}),
    (MESSAGES, {"tools": [{"type": "memory_20250818", "name": "memory"},
                          {"name": "now", "input_schema": EMPTY, "defer_loading": True}]},
     {"tools": [function()]}),
    (CHAT, {"tools": [function(), function(name="b")], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [function()]}}},
     {"tools": [function()], "required_tools": ["now"]}),
    (RESPONSES, {"tools": [{"type": "function", **NOW}, {"type": "function", "name": "b"}],
                 "tool_choice": {"type": "allowed_tools", "mode": "auto",
                                 "tools": [{"type": "function", "name": "now"}]}},
     {"tools": [function()]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "expected"), BECOMES)
def test_forms_become_what_they_mean(path, fields, expected):
    job = job_of(path, fields)
    assert {name: getattr(job, name) for name in expected} == expected


CALLED = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}
RESULT = {"role": "tool", "content": "noon", "tool_call_id": "c1"}
NO_IMAGE = "[content of type 'image_url' was left out: this model reads only text]"
HISTORIES: list[tuple[str, list[Any], list[dict[str, Any]]]] = [
    (CHAT, [{"role": "tool", "content": [{"type": "image_url"}]}],
     [{"role": "tool", "content": NO_IMAGE}]),
    (CHAT, [{"role": "function", "name": "now", "content": "noon"}],
     [{"role": "tool", "name": "now", "content": "noon"}]),
    (MESSAGES, [USER, {"role": "developer", "content": "b"}],
     [USER, {"role": "system", "content": "b"}]),
    (CHAT, [{"role": "developer", "content": "a"}], [{"role": "system", "content": "a"}]),
    (CHAT, [{"role": "assistant", "content": "a", "reasoning_content": "m", "refusal": None,
             "audio": None, "annotations": [], "id": "x", "provider_specific_fields": {}}],
     [{"role": "assistant", "content": "a", "reasoning_content": "m"}]),
    (CHAT, [{"role": "assistant", "content": None, "reasoning_content": None}],
     [{"role": "assistant", "content": ""}]),
    (CHAT, [{"role": "assistant", "content": None, "refusal": "No."}],
     [{"role": "assistant", "content": "No."}]),
    (CHAT, [{"role": "assistant", "content": "", "tool_calls": [called(index=0)]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "noon"}]}],
     [{"role": "assistant", "content": "", "tool_calls": [CALLED]}, RESULT]),
    (CHAT, [{"role": "assistant", "content": [{"type": "thinking", "thinking": "m"},
                                              {"type": "redacted_thinking", "data": "?"},
                                              {"type": "text", "text": "a", "cache_control": {}}]}],
     [{"role": "assistant", "content": "a", "reasoning_content": "m"}]),
    (RESPONSES, [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "?"}, USER],
     [USER]),
    (RESPONSES, [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "m"}]},
                 {"type": "message", "role": "assistant", "id": "m", "phase": "final_answer",
                  "content": [{"type": "output_text", "text": "a", "annotations": []}]}],
     [{"role": "assistant", "content": "a", "reasoning_content": "m"}]),
    (RESPONSES, [{"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
                 {"type": "function_call_output", "call_id": "c1",
                  "output": [{"type": "input_text", "text": "noon"}]}],
     [{"role": "assistant", "content": "", "tool_calls": [CALLED]}, RESULT]),
    (RESPONSES, [{"type": "function_call", "call_id": "c1", "namespace": "more", "name": "now",
                  "arguments": "{}"}],
     [{"role": "assistant", "content": "", "tool_calls": [
         CALLED | {"function": {"name": "more__now", "arguments": {}}}]}]),
    (RESPONSES, [{"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "x"},
                 {"type": "custom_tool_call_output", "call_id": "c1", "output": "noon"}],
     [{"role": "assistant", "content": "", "tool_calls": [
         CALLED | {"function": {"name": "patch", "arguments": {"input": "x"}}}]}, RESULT]),
    (RESPONSES, [USER, {"type": "web_search_call", "id": "w", "action": {"query": "x"}},
                 {"type": "ghost_snapshot", "ghost_commit": {}}], [USER]),
    (MESSAGES, [{"role": "assistant", "content": [
        {"type": "thinking", "thinking": "m", "signature": ""},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "text", "text": "a", "citations": []},
        {"type": "tool_use", "id": "c1", "name": "now", "input": None, "caller": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "is_error": False, "content": [
                {"type": "text", "text": "noon", "cache_control": {"type": "ephemeral"}},
                {"type": "tool_reference", "tool_name": "x"}]}]}],
     [{"role": "assistant", "content": "a", "reasoning_content": "m", "tool_calls": [CALLED]},
      RESULT]),
    (MESSAGES, [{"role": "user", "content": [
        {"type": "document", "title": "T", "source": {
            "type": "text", "media_type": "text/plain", "data": "body"}},
        {"type": "text", "text": "hi"}]}], [{"role": "user", "content": "T\nbody\nhi"}]),
    (CHAT, [{"role": "user", "content": ["a", {"type": "text", "text": None}]},
            {"role": "user", "content": []}, {"role": "user", "content": "b\ud83d"}],
     [{"role": "user", "content": text} for text in ("a", "", "b\ufffd")]),
    (CHAT, [{"role": "assistant", "content": None, "reasoning": {"a": 1}, "tool_calls": [
        {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "x"}}]}],
     [{"role": "assistant", "content": "", "tool_calls": [
         CALLED | {"function": {"name": "patch", "arguments": {"input": "x"}}}]}]),
    *((CHAT, [{"role": "tool", "tool_call_id": "c1", "content": content}],
       [RESULT | {"content": text}])
      for content, text in (
          (5, "5"), ([], ""), (None, ""), ({"a": 1}, '{"a": 1}'), ([{"a": 1}, "b"], '{"a": 1}b'),
          ([{"type": "error", "text": None}], ""),
          ([{"text": "a", "b": 1}], '{"text": "a", "b": 1}'),
          ({"type": "weather", "sun": True}, '{"type": "weather", "sun": true}'))),
    (RESPONSES, [{"type": "shell_call", "id": "c1", "action": {"commands": ["ls"]}},
                 {"type": "shell_call_output", "call_id": "c1", "output": [{"stdout": "a"}]}],
     [RESULT | {"content": '{"stdout": "a"}'}]),
    (RESPONSES, [{"type": "function_call", "id": "c1", "call_id": None, "name": "now",
                  "arguments": None}, {"type": "function_call_output", "call_id": "c1"}],
     [{"role": "assistant", "content": "", "tool_calls": [CALLED]}, RESULT | {"content": ""}]),
    (MESSAGES, [{"role": "user", "content": []}, {"role": "assistant", "content": None},
                {"role": "user", "content": ["a"]}],
     [{"role": "user", "content": ""}, {"role": "assistant", "content": ""},
      {"role": "user", "content": "a"}]),
    (MESSAGES, [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": {"a": 1}}]}],
     [RESULT | {"content": '{"a": 1}'}]),
    (MESSAGES, [{"role": "assistant", "content": [{"type": "compaction", "content": "a"}]}],
     [{"role": "assistant", "content": "a"}]),
    (MESSAGES, [USER, {"role": "system", "content": "a"}],
     [USER, {"role": "system", "content": "a"}]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "history", "messages"), HISTORIES)
def test_histories_of_clients_become_messages(path, history, messages):
    field = "input" if path == RESPONSES else "messages"
    assert job_of(path, {field: history}).messages == messages


@pytest.mark.parametrize("client", FORMS)
def test_whole_requests_of_clients_are_answered(host, client):
    path, body = FORMS[client]
    job = job_of(path, body)
    if job.messages is not None:
        assert job.messages[-1] == {"role": "user", "content": "so?"}
    assert len(job.tools or ()) == {"Codex": 2}.get(client, int(bool(body.get("tools"))))
    reply = host.client.post(path, json=body)
    text = "".join(TEXTS.findall(reply.text))
    assert reply.status_code == 200 and text.startswith("so?"), reply.text


def test_the_billing_line_of_claude_code_is_left_out():
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f2;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ]
    messages = job_of(MESSAGES, {"system": blocks}).messages or []
    assert messages[0] == {"role": "system", "content": "Be brief."}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 5.5}, "max_tokens"),
    (CHAT, {"n": 9}, "n"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0"),
    (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
    (MESSAGES, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [USER, {"role": "assistant", "audio": {"id": "a"}}]}, "messages.1.audio"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities.1"),
    (CHAT, {"functions": [NOW]}, "functions"),
    (CHAT, {"grammar": "root ::= x"}, "grammar"),
    (CHAT, {"guided_choice": ["a", "b"]}, "guided_choice"),
    (CHAT, {"adapters": "other"}, "adapters"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function"),
    (CHAT, {"tools": [{"type": "custom"}], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (TEXT, {"echo": True}, "echo"),
    (TEXT, {"logit_bias": [["a", 2]]}, "logit_bias"),
    (TEXT, {"logit_bias": [5]}, "logit_bias"),
    (RESPONSES, {"previous_response_id": "r"}, "previous_response_id"),
    (RESPONSES, {"conversation": "c"}, "conversation"),
    (RESPONSES, {"prompt": {"id": "p"}}, "prompt"),
    (RESPONSES, {"background": True}, "background"),
    (RESPONSES, {"n": 2}, "n"),
    (RESPONSES, {"include": ["message.output_text.logprobs"]}, "include"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "i"}]}, "input.0"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
     "input.0.content.0"),
    (RESPONSES, {"input": [USER, {"type": "function_call", "call_id": "c"}]}, "input.1"),
    (RESPONSES, {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}},
     "tool_choice"),
    (MESSAGES, {"container": "c"}, "container"),
    (MESSAGES, {"tools": [{"name": "a"}]}, "tools.0.input_schema"),
    (MESSAGES, {"tools": [{"type": "bash_20250124", "name": "bash"}],
                "tool_choice": {"type": "tool", "name": "bash"}}, "tool_choice"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
     "messages.0.content.0"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "mystery"}]}]},
     "messages.0.content.0"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED)
def test_what_would_be_answered_wrongly_is_refused(path, fields, param):
    reply = sent(path, fields)
    error = reply.json()["error"]
    assert reply.status_code == 400 and "\n" not in error["message"], reply.text
    assert error["message"].startswith(param) or error.get("param") == param


def test_each_kind_of_hint_is_logged_once(host, caplog):
    with caplog.at_level(logging.WARNING, logger="mlx_mtp.server"):
        for seed in range(3):
            host.chat("hello", new_hint={"a": seed}, tools=[{"type": "mcp"}])
    assert caplog.messages == [
        "/v1/chat/completions: the field 'new_hint' has no effect",
        "tools of type 'mcp' are left out of the prompt: the server cannot run them",
    ]


def test_a_call_of_a_namespace_has_both_names(host):
    add = {"type": "function", "name": "add"}
    body = {"input": "call", "tools": [{"type": "namespace", "name": "more", "tools": [add]}]}
    reply = host.client.post(RESPONSES, json=body).json()
    assert reply["tools"] == body["tools"]
    call = reply["output"][0]
    assert (call["name"], call["namespace"]) == ("add", "more")
    again = [{"role": "user", "content": "call"}, call]
    again += [{"type": "function_call_output", "call_id": call["call_id"], "output": "2"}]
    messages = job_of(RESPONSES, body | {"input": again}).messages or []
    assert messages[1]["tool_calls"][0]["function"]["name"] == "more__add"


HINT_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map("x_".__add__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
FULL: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [called()]},
                     RESULT, {"role": "user", "content": [{"type": "text", "text": "so?"}]}],
        "tools": [function()],
        "stream_options": {"include_usage": True},
        "mtp": {"details": True},
    },
    TEXT: {"prompt": "hi", "stop": ["x"]},
    RESPONSES: {
        "input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "1"}],
        "tools": [{"type": "function", **NOW}],
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
    },
    MESSAGES: {
        "max_tokens": 5,
        "messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}, USER],
        "tools": [{"name": "now", "input_schema": EMPTY}],
        "thinking": {"type": "enabled", "budget_tokens": 5},
    },
}  # fmt: skip


def sprinkled(draw: Any, value: Any, *, is_schema: bool = False) -> Any:
    """A value with hints in its objects, except in JSON schemas, and nulls for absent fields."""
    if isinstance(value, list):
        return [sprinkled(draw, item) for item in value]
    if not isinstance(value, dict) or is_schema:
        return value
    inner = {
        name: sprinkled(draw, item, is_schema=name in ("parameters", "input_schema"))
        for name, item in value.items()
    }
    return draw(st.dictionaries(HINT_NAMES, JSON, max_size=2)) | inner


OPTIONAL = ("temperature", "top_p", "seed", "stream", "user", "store", "tool_choice", "metadata")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_hints_leave_the_request_as_it_was(data):
    path = data.draw(st.sampled_from(list(FULL)))
    nulls = dict.fromkeys(data.draw(st.lists(st.sampled_from(OPTIONAL))))
    assert job_of(path, nulls | sprinkled(data.draw, FULL[path])) == job_of(path, FULL[path])
