"""Clients as their users have them: the SDKs of OpenAI and Anthropic, llm, curl, npm's openai."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.server.host import Host, hosted

HI: Any = [{"role": "user", "content": "hello"}]
NPM = Path(__file__).with_name("npm")
SLOW: Any = [{"role": "user", "content": "slow"}]


class Added(BaseModel):
    """Add one."""

    a: int


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted() as running:
        running.wait_for("ok")
        yield running


def test_openai_chat(client):
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model
    reply = client.chat.completions.create(model=model, messages=HI, max_tokens=4, seed=1)
    assert reply.choices[0].message.content == "hell"
    assert reply.choices[0].finish_reason == "length"
    details = reply.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (5, 3)
    assert reply.usage.prompt_tokens_details.cached_tokens == 4
    again = [*HI, reply.choices[0].message, {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model=model, messages=again).choices


def test_openai_chat_streams(client):
    stream = client.chat.completions.create(
        model="fake/model", messages=HI, stream=True, stream_options={"include_usage": True},
        extra_body={"mtp": {"details": True}},
    )  # fmt: skip
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [text for text in texts if text] == ["hel", "lo"]
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[2].model_extra["mtp"]["source"] == "mask"
    with client.chat.completions.stream(model="fake/model", messages=HI) as helper:
        assert helper.get_final_completion().choices[0].message.content == "hello"


def test_openai_tools(client):
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    ask: Any = [{"role": "user", "content": "call"}]
    reply = client.chat.completions.create(model="fake/model", messages=ask, tools=[tool])
    message = reply.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": 1}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
    again = client.chat.completions.create(
        model="fake/model", messages=[*ask, message, result], tools=[tool]
    )
    assert again.choices[0].message.content == "2"


def test_openai_completions_and_responses(client):
    text = client.completions.create(model="fake/model", prompt="hello", logprobs=1)
    assert text.choices[0].text == "hello" and text.choices[0].logprobs.tokens == list("hello")
    pieces = client.completions.create(model="fake/model", prompt="hello", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "hello"
    reply = client.responses.create(model="fake/model", input="hello", instructions="Be brief.")
    assert reply.output_text == "hello" and reply.usage.output_tokens == 5
    turns = [*HI, *reply.output, {"role": "user", "content": "more"}]
    assert client.responses.create(model="fake/model", input=turns).output_text == "more"
    with client.responses.stream(model="fake/model", input="hello") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "hello"
    assert deltas == ["hel", "lo"]


def test_openai_errors(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake/model", messages=HI, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError):
        format: Any = {"type": "xml"}
        client.chat.completions.create(model="fake/model", messages=HI, response_format=format)


def test_openai_asynchronously_and_leaving_early(host):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{host.url}/v1", api_key="none") as client:
            create = client.chat.completions.create
            turns: Any = [[{"role": "user", "content": f"{at}"}] for at in range(8)]
            asks = [create(model="fake/model", messages=messages) for messages in turns]
            replies = await asyncio.gather(*asks)
            async with await create(model="fake/model", messages=SLOW, stream=True) as stream:
                async for _ in stream:
                    break
            return [str(reply.choices[0].message.content) for reply in replies]

    assert asyncio.run(run()) == [str(at) for at in range(8)]


def test_anthropic(claude):
    reply = claude.messages.create(model="fake/model", messages=HI, max_tokens=4, system="Brief.")
    assert reply.content[0].text == "hell" and reply.stop_reason == "max_tokens"
    assert reply.usage.cache_read_input_tokens == 4
    with claude.messages.stream(model="fake/model", messages=HI, max_tokens=20) as stream:
        assert list(stream.text_stream) == ["hel", "lo"]
        assert stream.get_final_message().stop_reason == "end_turn"
    events = claude.messages.create(model="fake/model", messages=HI, max_tokens=20, stream=True)
    assert [event.type for event in events][-1] == "message_stop"
    assert claude.models.list().data[0].id == "fake/model"


def test_anthropic_tools_and_errors(claude):
    tool: Any = {"name": "add", "input_schema": {"type": "object"}}
    ask: Any = [{"role": "user", "content": "call"}]
    ways: Any = {"model": "fake/model", "max_tokens": 20, "tools": [tool]}
    with claude.messages.stream(messages=ask, **ways) as stream:
        reply = stream.get_final_message()
    assert reply.stop_reason == "tool_use" and reply.content[0].input == {"a": 1}
    result = {"type": "tool_result", "tool_use_id": reply.content[0].id, "content": "2"}
    turns = [*ask, {"role": "assistant", "content": reply.content}]
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "so?"}]})
    assert claude.messages.create(messages=turns, **ways).content[0].text == "so?"
    with pytest.raises(anthropic.BadRequestError) as bad:
        claude.messages.create(model="fake/model", messages=HI, max_tokens=0)
    body: Any = bad.value.body
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_llm(host, tmp_path):
    model = {"model_id": "mine", "model_name": "fake/model", "api_base": f"{host.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(f"- {json.dumps(model)}\n")
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    environment["LLM_LOAD_PLUGINS"] = ""  # the default model's wheel is one, and lacks its engine
    for more in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "prompt", "-m", "mine", "hello", *more]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.stdout.strip() == "hello", run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("responses", [False, True])
def test_langchain(host, responses):
    chats = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")
    ways = {"use_responses_api": responses, "base_url": f"{host.url}/v1", "api_key": "none"}
    model = chats.ChatOpenAI(model="gpt-9", max_tokens=20, **ways)
    assert model.invoke("hello").text == "hello"
    assert "".join(piece.text for piece in model.stream("hello")) == "hello"
    tools = model.bind_tools([Added], strict=True, parallel_tool_calls=False)
    call = tools.invoke("call")
    assert call.tool_calls[0]["args"] == {"a": 1}
    result = messages.ToolMessage("2", tool_call_id=call.tool_calls[0]["id"])
    assert tools.invoke([messages.HumanMessage("call"), call, result]).text == "2"
    assert model.with_structured_output(Added).invoke('{"a": 1}') == Added(a=1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(host):
    url, body = f"{host.url}/v1/chat/completions", {"messages": HI, "stream": True}
    command = ["curl", "-sSN", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = run.stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]" and '"hel"' in run.stdout
    body["stream"] = False
    run = subprocess.run([*command[:-1], json.dumps(body)], capture_output=True, timeout=60)
    assert json.loads(run.stdout)["choices"][0]["message"]["content"] == "hello"


npm = pytest.mark.skipif(
    not (NPM / "node_modules" / "openai").is_dir(),
    reason="make test installs the packages of npm where there is npm",
)


def node(script: str, host: Host) -> Any:
    """What a script of the folder npm prints about the server."""
    command = ["node", str(NPM / script), host.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@npm
@pytest.mark.slow
def test_npm_openai(host):
    assert node("ask_openai.mjs", host) == {
        "whole": "hello",
        "streamed": "hello",
        "pieces": 2,
        "accepted": 5,
        "text": "hello",
        "response": "hello",
        "last": "response.completed",
        "refused": {"status": 400, "param": "temperature"},
    }


@npm
@pytest.mark.slow
def test_npm_anthropic(host):
    assert node("ask_claude.mjs", host) == {
        "model": "fake/model",
        "whole": "hello",
        "streamed": "hello",
        "pieces": 2,
        "counted": True,
        "refused": {"status": 400, "type": "invalid_request_error"},
    }
