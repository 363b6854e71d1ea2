"""The server over a fake engine: the shape of what comes back, and fields that are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from mlx_mtp.apps.engine.protocol import Group
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.app import create_app
from mlx_mtp.apps.server.metrics import Metrics
from mlx_mtp.apps.server.settings import Settings
from tests.server.host import HI, PATHS, Host, hosted


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted(allowed_origins=("https://app.example",)) as running:
        running.wait_for("ok")
        yield running


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream; names of events must agree with their types."""
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith(":"):  # a comment, which says that the stream still lives
            continue
        data = lines[-1].removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
        if len(lines) == 2:
            assert lines[0] == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("path", PATHS)
def test_each_api_answers(host, path):
    reply = host.client.post(path, json=PATHS[path])
    assert reply.status_code == 200, reply.text
    body = reply.json()
    text = {
        "/v1/chat/completions": lambda: body["choices"][0]["message"]["content"],
        "/v1/completions": lambda: body["choices"][0]["text"],
        "/v1/responses": lambda: body["output"][0]["content"][0]["text"],
        "/v1/messages": lambda: body["content"][0]["text"],
    }[path]()
    assert text == "hello"
    assert body["timings"]["draft_n"] == 8 and body["timings"]["draft_n_accepted"] == 5


def test_a_stream_has_an_event_for_every_step(host):
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events(host.client.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert [delta.get("content") for delta in deltas] == ["", "hel", "lo", None]
    assert deltas[0]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 5,
            "rejected_prediction_tokens": 3,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert not any("mtp" in chunk for chunk in chunks)


def test_a_stream_tells_what_each_step_did_when_asked(host):
    body = {"messages": HI, "stream": True, "mtp": {"details": True}}
    chunks = events(host.client.post("/v1/chat/completions", json=body))[:-1]
    told = [chunk["mtp"] for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
    assert told == [
        {"tokens": 3, "accepted": 2, "drafted": 4, "source": "mask"},
        {"tokens": 2, "accepted": 1, "drafted": 4, "source": "mask"},
    ]
    assert chunks[-1]["mtp"]["tokens_per_step"] == 3.0


def test_responses_stream_in_the_order_of_openai(host):
    found = events(host.client.post("/v1/responses", json={"input": "hello", "stream": True}))
    assert [each["type"].removeprefix("response.") for each in found] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "hello"


def test_messages_stream_in_the_order_of_anthropic(host):
    body = PATHS["/v1/messages"] | {"stream": True, "max_tokens": 3}
    found = events(host.client.post("/v1/messages", json=body))
    assert [each["type"] for each in found] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["cache_read_input_tokens"] == 4


@pytest.mark.parametrize("path", PATHS)
def test_text_is_the_same_streamed_or_not(host, path):
    text = 'Grüße, "Welt" \u2028 \U0001f600 done'
    turns = [{"role": "user", "content": text}]
    body = {
        "/v1/chat/completions": {"messages": turns},
        "/v1/completions": {"prompt": text},
        "/v1/responses": {"input": text},
        "/v1/messages": {"messages": turns, "max_tokens": 99},
    }[path] | {"stream": True}
    pieces = []
    for each in events(host.client.post(path, json=body)):
        if isinstance(each, dict):
            choice = (each.get("choices") or [{}])[0]
            delta = each.get("delta") or choice.get("delta") or choice.get("text") or ""
            pieces.append(
                delta if isinstance(delta, str) else delta.get("content") or delta.get("text") or ""
            )
    assert "".join(pieces) == text


def test_n_choices_are_told_apart(host):
    reply = host.chat("hello", n=3, seed=4).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["prompt_tokens"] == 10 and reply["usage"]["completion_tokens"] == 15
    prompts = host.client.post("/v1/completions", json={"prompt": ["abc", "defg"], "n": 2}).json()
    assert [choice["text"] for choice in prompts["choices"]] == ["abc", "abc", "defg", "defg"]
    assert prompts["usage"]["prompt_tokens"] == 20


def test_logprobs_come_in_both_shapes(host):
    chat = host.chat("abcd", logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in chat] == list("abcd")
    old = host.client.post("/v1/completions", json={"prompt": "abcd", "logprobs": 0}).json()
    assert old["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_tool_calls_come_in_every_shape(host):
    function = {"name": "add", "parameters": {"type": "object"}}
    chat = host.chat("call", tools=[{"type": "function", "function": function}]).json()
    call = chat["choices"][0]["message"]["tool_calls"][0]
    assert chat["choices"][0]["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    body = {"input": "call", "tools": [{"type": "function", **function}], "stream": True}
    kinds = [each["type"] for each in events(host.client.post("/v1/responses", json=body))]
    assert "response.function_call_arguments.done" in kinds
    ask = [{"role": "user", "content": "call"}]
    tool = {"name": "add", "input_schema": {"type": "object"}}
    body = {"messages": ask, "max_tokens": 9, "tools": [tool]}
    block = host.client.post("/v1/messages", json=body).json()["content"][0]
    assert block["type"] == "tool_use" and block["input"] == {"a": 1}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {"temperature": 3}, "temperature"),
        ("chat/completions", {"temperature": "hot"}, "temperature"),
        ("chat/completions", {"temperature": True}, "temperature"),
        ("chat/completions", {"top_p": -0.1}, "top_p"),
        ("chat/completions", {"min_p": 2}, "min_p"),
        ("chat/completions", {"top_k": -2}, "top_k"),
        ("chat/completions", {"top_k": 10**12}, "top_k"),
        ("chat/completions", {"seed": 0.5}, "seed"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"max_tokens": 2**63}, "max_tokens"),
        ("chat/completions", {"n": 9}, "n"),
        ("chat/completions", {"n": 0}, "n"),
        ("chat/completions", {"stop": "a" * 1001}, "stop"),
        ("chat/completions", {"stop": ["a"] * 17}, "stop"),
        ("chat/completions", {"logit_bias": {"260": 1}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"-1": 1}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"1": 101}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"tool_choice": {"type": "function"}}, "tool_choice"),
        ("chat/completions", {"mtp": {"layout": "round"}}, "mtp.layout"),
        ("chat/completions", {"mtp": {"num_draft_tokens": 5}}, "mtp.num_draft_tokens"),
        ("chat/completions", {"mtp": {"drafter": "native"}}, "mtp.drafter"),
        ("chat/completions", {"mtp": {"drafter": "magic"}}, "mtp.drafter"),
        ("chat/completions", {"mtp": 1}, "mtp"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt.0"),
        ("completions", {"echo": True}, "echo"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"logprobs": 6}, "logprobs"),
        ("completions", {"prompt": ["a"] * 5, "n": 2}, "n"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ("responses", {"tools": [{"type": "function"}]}, "tools.0.name"),
        ("responses", {"input": []}, "input"),
    ],
)
def test_bad_fields_are_named(host, path, fields, param):
    reply = host.client.post(f"/v1/{path}", json=PATHS[f"/v1/{path}"] | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": "sometimes"}, "thinking"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
    ],
)
def test_anthropic_errors_have_its_shape(host, fields, name):
    reply = host.client.post("/v1/messages", json=PATHS["/v1/messages"] | fields)
    assert reply.status_code == 400
    body = reply.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert name in body["error"]["message"]


def test_drafts_of_a_chain_are_counted_by_drafter():
    metrics = Metrics()
    steps = [
        Group(text="", tokens=5, accepted=4, parts=[("mask", 3), ("lookup", 4)]),
        Group(text="", tokens=2, accepted=1, parts=[("mask", 3), ("lookup", 4)]),
        Group(text="", tokens=1, accepted=0),
    ]
    for step in steps:
        metrics.group(step, seconds=1.0, first=False)
    lines = metrics.text().decode().splitlines()
    for name, source, count in (
        ("drafts", "mask", 6), ("drafts", "lookup", 8),
        ("drafts_accepted", "mask", 4), ("drafts_accepted", "lookup", 1),
    ):  # fmt: skip
        assert f'mlx_mtp_{name}_total{{source="{source}"}} {count}.0' in lines
    assert (steps[0].source, steps[0].drafted) == ("mask+lookup", 7)
    assert (steps[2].source, steps[2].drafted) == ("", 0)


def test_a_request_chooses_the_drafter(host):
    reply = host.chat("job", mtp={"drafter": "lookup"}).json()
    job = json.loads(reply["choices"][0]["message"]["content"])
    assert job["drafter"] == "lookup"
    reply = host.chat("job", mtp={"layout": "linear"}).json()
    assert "drafter" not in json.loads(reply["choices"][0]["message"]["content"])


def test_models_health_and_metrics(host):
    listed = host.client.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["fake/model"]
    assert listed[0]["drafters"] == ["mask", "lookup"]
    assert host.client.get("/v1/models/fake/model").json() == listed[0]
    assert host.client.get("/v1/models/gpt-9").status_code == 404
    assert host.chat("hello", model="gpt-9").json()["model"] == "fake/model"
    health = host.client.get("/health").json()
    assert (health["status"], health["drafters"]) == ("ok", ["mask", "lookup"])
    host.chat("hello")
    text = host.client.get("/metrics").text
    for name in (
        "requests_total", "tokens_total", "steps_total", "drafts_total", "drafts_accepted_total",
        "queue_length", "running", "engine_restarts_total", "time_to_first_token_seconds_bucket",
        "time_per_token_seconds_bucket",
    ):  # fmt: skip
        assert f"mlx_mtp_{name}" in text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    prompts = counts['mlx_mtp_prompt_cache_requests_total{result="memory"}']
    for source, count in (("memory", 4), ("files", 0), ("computed", 6)):
        tokens = counts[f'mlx_mtp_prompt_tokens_total{{source="{source}"}}']
        assert float(tokens) == count * float(prompts)


def test_names_of_models_are_checked_if_the_operator_says_so(host):
    for path, body in PATHS.items():
        assert host.client.post(path, json=body | {"model": "gpt-9"}).status_code == 200
    with hosted(strict_model=True) as strict:
        strict.wait_for("ok")
        for name in ("fake/model", "default_model", None, ""):
            assert strict.chat("hello", model=name).json()["model"] == "fake/model"
        for path, body in PATHS.items():
            reply = strict.client.post(path, json=body | {"model": "gpt-9"})
            assert reply.status_code == 404 and "gpt-9" in reply.text


def test_models_in_the_form_of_anthropic(host):
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "anything-2099-01-01"}
    listed = host.client.get("/v1/models", headers=headers).json()
    assert listed["first_id"] == listed["data"][0]["id"] == "fake/model"
    assert listed["has_more"] is False and listed["data"][0]["type"] == "model"
    assert host.client.get("/v1/models/fake%2Fmodel", headers=headers).status_code == 200
    assert host.client.get("/v1/models/gpt-9", headers=headers).json()["type"] == "error"


@pytest.mark.parametrize("path", [*PATHS, "/v1/models", "/v1/messages/count_tokens"])
def test_routes_without_v1(host, path):
    method = "GET" if path.endswith("models") else "POST"
    body = PATHS["/v1/messages" if "count" in path else path] if method == "POST" else None
    replies = [
        host.client.request(method, start + path.removeprefix("/v1") + "?beta=true", json=body)
        for start in ("", "/v1")
    ]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert replies[0].json().keys() == replies[1].json().keys()


def test_tokens_are_counted_and_converted_while_all_slots_are_taken(host):
    with hosted(engine={"max_concurrent": 1}) as busy:
        busy.wait_for("ok")
        stream = busy.client.stream(
            "POST", "/v1/completions", json={"prompt": "slow", "stream": True}
        )
        with stream as reply:
            next(reply.iter_bytes())
            body = {"messages": HI, "system": "x", "tools": [{"name": "a", "input_schema": {}}]}
            counted = busy.client.post("/v1/messages/count_tokens", json=body)
            assert counted.json() == {"input_tokens": 10}
            tokens = busy.client.post("/tokenize", json={"content": "hé"}).json()["tokens"]
            assert busy.client.post("/detokenize", json={"tokens": tokens}).json() == {
                "content": "hé"
            }
    refused = host.client.post("/v1/messages/count_tokens", json={"messages": []})
    assert refused.status_code == 400 and refused.json()["type"] == "error"


def test_what_the_server_says_about_itself(host):
    props = host.client.get("/props").json()
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 1000
    assert host.client.head("/").status_code == 200 and "/v1" in host.client.get("/").text


def test_unknown_paths_and_methods_have_the_shape_of_errors(host):
    assert host.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert host.client.get("/v1/chat/completions").status_code == 405
    assert host.client.get("/v1/messages").json()["type"] == "error"


def test_the_engine_may_refuse_or_fail_a_request(host):
    reply = host.chat("refuse")
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "no"
    assert host.chat("fail").status_code == 500
    assert host.chat("refuse", stream=True).status_code == 400
    last = events(host.chat("fail", stream=True))[-1]
    assert last["error"]["type"] == "server_error"


def test_the_openapi_document_has_every_field(host):
    document = host.client.get("/openapi.json").json()
    assert set(PATHS) <= set(document["paths"])
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "mtp", "logit_bias", "top_k"} <= set(fields)


def test_other_programs_can_mount_their_routes():
    async def page(request: Request) -> Response:
        return Response(request.app.state.context.engine.state)

    routes = [Route("/page", page), Route("/other", page)]
    settings = Settings(api_key="secret")
    app = create_app(Engine({}), settings, routes=routes, public_paths=("/page",))
    client = TestClient(app, base_url="http://localhost")  # not entered: no engine is started
    assert client.get("/page").text == "loading"
    assert client.get("/page", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/other").status_code == 401
