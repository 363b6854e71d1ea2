"""What the server answers, it accepts a turn later: generated conversations with tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.apps.engine.tool_calls import GENERIC, ToolCallReader
from mlx_mtp.text.chat_template import chat_text
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.server.host import Host, hosted

STRICT = ("mistral 7b", "ministral 3", "gemma 3", "llama 3")
TOKENIZERS = [byte_tokenizer(template=TEMPLATES[name]) for name in STRICT]
SCHEMA = {"type": "object", "properties": {"a": {}}}
ODD_ARGUMENTS = ["", "null", "[1]", "no JSON", "{}", '{"a": 1}', None, [1], {}, {"a": 1}, 3]
VALUES = st.recursive(
    st.sampled_from([None, True, -1.5, "", "\ud83d\ude00", "\ud800", "</tool_call>", float("nan")]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted() as running:
        running.wait_for("ok")
        yield running


@st.composite
def answers(draw: Any) -> str:
    """What a model may write: text, mentions of marks, and calls in many forms."""
    parts = []
    for kind in draw(st.lists(st.sampled_from(["text", "mark", "call", "call"]), max_size=4)):
        if kind == "text":
            parts.append(draw(st.sampled_from(["Well.", "\n", " ", "<tool_", "{}", "é"])))
        elif kind == "mark":
            parts.append(draw(st.sampled_from(["<tool_call>", "</tool_call>"])))
        else:
            arguments = draw(st.sampled_from(ODD_ARGUMENTS) | VALUES)
            key = draw(st.sampled_from(["arguments", "parameters"]))
            call = {"name": draw(st.sampled_from(["add", "get now", "é"])), key: arguments}
            text = json.dumps(call if draw(st.booleans()) else {"name": "add"})
            parts.append(f"<tool_call>{text}</tool_call>")
    return "".join(parts)


class Client:
    """Sends a conversation in one dialect, and appends what comes back as clients do."""

    path = "/v1/chat/completions"
    field = "messages"

    def __init__(self, host: Host, *, stream: bool) -> None:
        self._host = host
        self._stream = stream
        self.items: list[dict[str, Any]] = []
        self.text = ""
        self.calls: list[tuple[str, str, Any]] = []  # id, name, arguments

    def ask(self, text: str) -> None:
        self.items.append({"role": "user", "content": text})
        self.send()

    def send(self) -> None:
        """Send the conversation; the answer is appended."""
        body = {
            self.field: self.items,
            "stream": self._stream,
            "tools": self.tools(),
            **self.more(),
        }
        reply = self._host.client.post(self.path, json=body)
        assert reply.status_code == 200, (reply.text, self.items)
        self.calls = []
        self.add(self.assembled(_events(reply)) if self._stream else reply.json())

    def more(self) -> dict[str, Any]:
        return {"max_tokens": 10**6}

    def tools(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]

    def odd_call(self, arguments: Any) -> None:
        """A call that another server has written, with its result."""
        function = {"name": "add", "arguments": arguments}
        call = {"id": "odd", "index": 0, "type": "function", "function": function}
        self.items += [{"role": "assistant", "content": None, "tool_calls": [call]}]
        self.result("odd", "1")

    def result(self, call_id: str, text: str) -> None:
        self.items.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def assembled(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        for event in events:
            for choice in event["choices"]:
                message["content"] += choice["delta"].get("content") or ""
                for call in choice["delta"].get("tool_calls", ()):
                    message.setdefault("tool_calls", []).append(call)
        return {"choices": [{"message": message}]}

    def add(self, reply: dict[str, Any]) -> None:
        message = reply["choices"][0]["message"]
        self.items.append(message)
        self.text = message["content"] or ""
        for call in message.get("tool_calls", ()):
            function = call["function"]
            self.calls.append((call["id"], function["name"], json.loads(function["arguments"])))


class Responses(Client):
    path = "/v1/responses"
    field = "input"

    def more(self) -> dict[str, Any]:
        return {"max_output_tokens": 10**6}

    def tools(self) -> list[dict[str, Any]]:
        return [{"type": "function", "name": "add", "parameters": SCHEMA}]

    def odd_call(self, arguments: Any) -> None:
        call = {"type": "function_call", "call_id": "odd", "name": "add", "arguments": arguments}
        self.items.append(call)
        self.result("odd", "1")

    def result(self, call_id: str, text: str) -> None:
        self.items.append({"type": "function_call_output", "call_id": call_id, "output": text})

    def assembled(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
        assert events[-1]["response"]["output"] == done
        return {"output": done}

    def add(self, reply: dict[str, Any]) -> None:
        self.items += reply["output"]
        self.text = ""
        for item in reply["output"]:
            if item["type"] == "message":
                self.text += "".join(part["text"] for part in item["content"])
            else:
                self.calls.append((item["call_id"], item["name"], json.loads(item["arguments"])))


class Messages(Client):
    path = "/v1/messages"

    def tools(self) -> list[dict[str, Any]]:
        return [{"name": "add", "input_schema": SCHEMA}]

    def odd_call(self, arguments: Any) -> None:
        call = {"type": "tool_use", "id": "odd", "name": "add", "input": arguments}
        self.items.append({"role": "assistant", "content": [call]})
        self.result("odd", "1")

    def result(self, call_id: str, text: str) -> None:
        block = {"type": "tool_result", "tool_use_id": call_id, "content": text}
        if self.items[-1]["role"] == "user":
            self.items[-1]["content"].append(block)
        else:
            self.items.append({"role": "user", "content": [block]})

    def assembled(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        for event in events:
            if event["type"] == "content_block_start":
                blocks.append(event["content_block"])
            elif event["type"] == "content_block_delta" and "text" in event["delta"]:
                blocks[-1]["text"] += event["delta"]["text"]
            elif event["type"] == "content_block_delta":
                blocks[-1]["input"] = json.loads(event["delta"]["partial_json"])
        return {"content": blocks}

    def add(self, reply: dict[str, Any]) -> None:
        self.items.append({"role": "assistant", "content": reply["content"]})
        self.text = ""
        for block in reply["content"]:
            if block["type"] == "text":
                self.text += block["text"]
            else:
                self.calls.append((block["id"], block["name"], block["input"]))


def _events(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def check_conversation(
    host: Host, client_class: type[Client], stream: bool, odd: Any, texts: list[str]
) -> None:
    """Hold a conversation whose answers are these, and return every call with a result."""
    client = client_class(host, stream=stream)
    if odd is not Ellipsis:
        client.items.append({"role": "user", "content": "hi"})
        client.odd_call(odd)
    emitted = [] if odd is Ellipsis else [None]
    for text in texts:
        reader = ToolCallReader(GENERIC, [])
        shown = reader.push(text) + reader.finish()
        client.ask(f"reply:{json.dumps([shown, reader.calls])}")
        assert client.text == shown
        expected = [(call["name"], json.loads(call["arguments"])) for call in reader.calls]
        assert [call[1:] for call in client.calls] == expected
        assert all(isinstance(call[2], dict) for call in client.calls)
        emitted += expected
        for call_id, *_ in list(client.calls):
            client.result(call_id, "42")
    client.ask("history")
    history = json.loads(client.text)
    calls = [call["function"] for message in history for call in message.get("tool_calls", ())]
    assert [(call["name"], call["arguments"]) for call in calls][len(calls) - len(emitted) :] == [
        ("add", calls[0]["arguments"]) if each is None else each for each in emitted
    ]
    for tokenizer in TOKENIZERS:
        assert chat_text(tokenizer, history)


CASES = (
    st.sampled_from([Client, Responses, Messages]),
    st.booleans(),
    st.sampled_from([..., *ODD_ARGUMENTS]),
    st.lists(answers(), min_size=1, max_size=3),
)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(*CASES)
def test_every_answer_is_accepted_a_turn_later(host, client_class, stream, odd, texts):
    check_conversation(host, client_class, stream, odd, texts)


@pytest.mark.soak
@settings(max_examples=500, deadline=None, database=None)
@given(*CASES)
def test_every_answer_of_many_conversations_is_accepted(host, client_class, stream, odd, texts):
    check_conversation(host, client_class, stream, odd, texts)


@pytest.mark.parametrize("client_class", [Client, Responses, Messages])
@pytest.mark.parametrize("odd", ODD_ARGUMENTS)
def test_odd_arguments_in_the_history_are_accepted(host, client_class, odd):
    check_conversation(host, client_class, False, odd, ["Well."])


def test_refusals_name_fields_of_the_dialect(host):
    for path, param in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        body = {param: [{"role": "user", "content": "refuse"}]}
        reply = host.client.post(path, json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    call = {"type": "function_call", "call_id": "c"}
    reply = host.client.post("/v1/responses", json={"input": [call]})
    assert reply.json()["error"]["param"] == "input.0.name"
