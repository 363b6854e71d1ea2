"""``mlx-mtp serve`` whole: its process, a tiny model in a child, real clients, real deaths."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.generate import chat_text, generate
from mlx_mtp.loading import load
from mlx_mtp.storage.default_model import default_model_path
from tests.server.command import Served, command, served, serving
from tests.server.soak_clients import soak
from tests.server.soak_kills import kill_often
from tests.server.soak_requests import fuzz

ARGUMENTS = ("--queue-size", "256", "--max-tokens", "8", "--client-timeout", "5")
TEXTS = [f"Tell {at} things about the number {at * 7}." for at in range(8)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(folder, *ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="module")
def plain(folder, server) -> list[str]:
    """What ``generate`` answers to each text, one token a step."""
    del server  # it has written the model
    model, tokenizer = load(str(folder / "model"), mtp=False)
    found = []
    for text in TEXTS:
        prompt = chat_text(tokenizer, [{"role": "user", "content": text}])
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        found.append(generate(model, tokenizer, ids, max_tokens=24, layout="plain"))
    return found


def test_counts_are_those_of_the_usage(server):
    body = {"messages": [{"role": "user", "content": "Hi é"}], "system": "Be brief."}
    counted = server.client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    usage = server.client.post("/v1/messages", json=body | {"max_tokens": 3}).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"] > 10
    assert "Be brief" not in server.client.get("/props").json()["chat_template"]
    text = "Hi é <0x41>"
    ids = server.client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert server.client.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    bad = server.client.post("/detokenize", json={"tokens": [10**6]})
    assert bad.status_code == 400 and "1000000" in bad.text


def test_options_of_templates_and_caches(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}{{ mark }}{{ message.content }}{% endfor %}{{ end }}"
    )
    marks = json.dumps({"mark": "<one>", "end": "."})
    options = ("--chat-template", str(template), "--chat-template-args", marks)
    sizes = ("--max-kv-size", "16", "--prefill-step-size", "8", "--max-tokens", "24")
    with served(tmp_path, *options, *sizes) as running:
        assert running.client.get("/props").json()["chat_template"] == template.read_text()
        text = "Tell nothing about the number seven."
        both = [running.chat(text).json(), running.chat(text).json()]
        other = running.chat(text, chat_template_kwargs={"mark": ""}).json()
    model, tokenizer = load(str(tmp_path / "model"), mtp=False)
    lengths = {"max_kv_size": 16, "prefill_step_size": 8, "max_tokens": 24, "layout": "plain"}
    for reply, prompt in (
        (both[0], f"<one>{text}."),
        (both[1], f"<one>{text}."),
        (other, f"{text}."),
    ):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert reply["usage"]["prompt_tokens"] == len(ids)
        answer = reply["choices"][0]["message"]["content"]
        assert answer == generate(model, tokenizer, ids, **lengths)
    refused = subprocess.run(
        command("--model", str(tmp_path / "model"), "--port", "0", "--kv-bits", "8"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 2 and "kv_group_size 64 does not divide" in refused.stderr


@pytest.mark.parametrize("mtp", [True, False])
def test_eight_clients_at_once_get_the_text_of_generate(server, plain, mtp):
    with ThreadPoolExecutor(8) as pool:
        asks = [pool.submit(server.chat, text, max_tokens=24, mtp=mtp) for text in TEXTS]
        replies = [each.result().json() for each in asks]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == plain
    drafted = sum(reply["timings"]["draft_n"] for reply in replies)
    assert (drafted > 0) == mtp


def test_sdks_get_the_text_of_generate(server, plain):
    ask: Any = [{"role": "user", "content": TEXTS[0]}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="tiny", messages=ask, max_tokens=24, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == plain[0]
        reply = client.responses.create(model="tiny", input=TEXTS[0], max_output_tokens=24)
        assert reply.output_text == plain[0]
    with anthropic.Anthropic(base_url=server.url, api_key="none") as claude:
        with claude.messages.stream(model="tiny", messages=ask, max_tokens=24) as events:
            assert "".join(events.text_stream) == plain[0]
        assert (events.get_final_message().usage.cache_read_input_tokens or 0) > 8


def test_sampling_with_a_seed_is_repeatable_over_http(server):
    ways = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "max_tokens": 16, "n": 2}
    one, two = (server.chat("Once", **ways).json()["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in one]
    assert texts == [choice["message"]["content"] for choice in two]
    assert texts[0] != texts[1]


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
FUNCTION = {"name": "weather", "description": "Weather of a city.", "parameters": WEATHER}
TOOLS = [{"type": "function", "function": FUNCTION}]


def check_required_call(server: Served) -> dict[str, Any]:
    """Ask for a call with MTP and plainly; return the message."""
    ways: dict[str, Any] = {
        "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
        "logprobs": True, "max_tokens": 90,
    }  # fmt: skip
    replies = [server.chat("Is it hot in Rome?", mtp=mtp, **ways).json() for mtp in (True, False)]
    choices = [reply["choices"][0] for reply in replies]
    tokens = [[each["token"] for each in choice["logprobs"]["content"]] for choice in choices]
    assert tokens[0] == tokens[1]
    assert replies[0]["usage"]["completion_tokens_details"]["rejected_prediction_tokens"]
    assert {choice["finish_reason"] for choice in choices} == {"tool_calls"}
    [call] = choices[0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    return choices[0]["message"]


def test_tools_work_where_the_template_knows_none(server):
    """In two dialects, with MTP and plainly, streamed and whole; then with the call's result."""
    message = check_required_call(server)
    [call] = message["tool_calls"]
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    tool: Any = {"name": "weather", "description": "Weather of a city.", "input_schema": WEATHER}
    for mtp in (True, False):
        with client.messages.stream(
            model="any", max_tokens=90, tools=[tool], extra_body={"mtp": mtp},
            messages=[{"role": "user", "content": "Is it hot in Rome?"}],
            tool_choice={"type": "tool", "name": "weather"},
        ) as stream:  # fmt: skip
            reply = stream.get_final_message()
        [block] = reply.content
        assert block.type == "tool_use" and reply.stop_reason == "tool_use"
        assert block.input == json.loads(call["function"]["arguments"])
    result: Any = {"role": "tool", "tool_call_id": call["id"], "content": "30 degrees"}
    body = {"messages": [{"role": "user", "content": "Hot?"}, message, result]}
    for more in ({}, {"tools": TOOLS}):
        reply = server.client.post("/v1/chat/completions", json=body | {"max_tokens": 2} | more)
        assert reply.status_code == 200


def test_the_default_model_can_be_made_to_call_a_tool(tmp_path):
    (tmp_path / "cache").mkdir()  # with the model, which takes seconds to write
    (tmp_path / "cache" / default_model_path().name).symlink_to(default_model_path())
    with serving(tmp_path, "--num-draft-tokens", "3") as server:
        check_required_call(server)


def test_the_engine_pushes_nobody_aside_and_the_loop_is_watched(server):
    assert os.sched_getscheduler(server.engine_pid) == os.SCHED_BATCH
    assert os.sched_getscheduler(server.server_pid) == os.SCHED_OTHER
    time.sleep(0.3)
    text = server.client.get("/metrics").text
    late = next(line for line in text.splitlines() if "event_loop_late_seconds_count" in line)
    assert float(late.split()[1]) >= 2


def test_an_answer_stops_within_a_second_of_its_client(server):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as reply:
        next(reply.iter_lines())
    left = time.monotonic()
    while "mlx_mtp_running 0.0" not in server.client.get("/metrics").text:
        assert time.monotonic() - left < 5  # one on a quiet machine
        time.sleep(0.02)


def show(**reports: dict[str, Any]) -> None:
    """Print a report as one line of JSON; `pytest -rP` shows it for tests that pass too."""
    print(json.dumps(reports))


@pytest.mark.parametrize(
    ("clients", "seconds"), [(16, 3), pytest.param(64, 300, marks=pytest.mark.soak)]
)
def test_many_clients_each_get_their_own_answers(server, clients, seconds):
    report = soak(server, clients=clients, seconds=seconds)
    show(soak=report)
    assert report["replies"] >= clients and report["why"] == []
    assert report["lost"] == report["crossed"] == report["health_bad"] == 0
    if seconds >= 60:  # in less, memory has not settled
        assert report["server_growth"] < 0.05 and report["engine_growth"] < 0.05


@pytest.mark.parametrize("requests", [150, pytest.param(10_000, marks=pytest.mark.soak)])
def test_made_up_requests_do_no_harm(server, seed, requests):
    report = fuzz(server, requests=requests, seed=seed)
    show(fuzz=report)
    assert report["requests"] >= requests
    assert report["bad"] == [] and report["restarts"] == 0


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_the_engine_is_killed_in_the_middle_of_answers(server, kills):
    report = kill_often(server, kills=kills)
    show(kills=report)
    assert report["kills"] == kills and report["unclean"] == []


def test_a_signal_ends_it_all_and_leaves_nothing(tmp_path):
    with served(tmp_path) as server:
        engine = server.engine_pid
        assert engine is not None
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            began = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-1]
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10  # two on a quiet machine
        assert not os.path.exists(f"/proc/{engine}")


def test_a_second_signal_prints_no_traceback(tmp_path, capfd):
    with served(tmp_path) as server:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)  # two at once may arrive as one
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_the_engine_does_not_outlive_a_killed_server(tmp_path):
    with served(tmp_path) as server:
        engine = server.engine_pid
        server.process.kill()
        began = time.monotonic()
        while os.path.exists(f"/proc/{engine}"):
            assert time.monotonic() - began < 10
            time.sleep(0.02)


def test_a_long_prompt_comes_back_after_a_restart(tmp_path):
    text = "".join(f"Line {number} of a long prompt. " for number in range(30))
    replies, metrics = [], []
    for arguments in ((), (), ("--no-prompt-cache-files",)):
        with served(tmp_path, "--max-tokens", "4", *arguments) as server:
            replies.append(server.chat(text).json())
            metrics.append(server.client.get("/metrics").text)
    texts = {reply["choices"][0]["message"]["content"] for reply in replies}
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    size = replies[0]["usage"]["prompt_tokens"]
    assert len(texts) == 1 and cached == [0, size // 256 * 256, 0]
    assert f'prompt_tokens_total{{source="files"}} {cached[1]:.1f}' in metrics[1]
    assert 'prompt_cache_requests_total{result="miss"} 1.0' in metrics[2]
    folder = tmp_path / "cache" / "prompts"
    assert len(list(folder.rglob("*.safetensors"))) == size // 256


def failure(*arguments: str) -> str:
    """Run a command that must fail politely; return its one line."""
    result = CliRunner().invoke(cli, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_bad_options_are_told_in_one_line():
    assert "--api-key" in failure("--host", "0.0.0.0")
    assert "'4 apples' is not a size" in failure("--prompt-cache-bytes", "4 apples")
    assert "--allowed-origins" in failure("--allowed-origins", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use" in failure("--port", port)


def test_a_model_that_is_not_there_ends_the_server_in_one_line():
    run = subprocess.run(
        command("--model", "/no/such/model", "--port", "0"), capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.splitlines() == ["Error: model /no/such/model does not exist"]
    assert re.fullmatch(r"Listening on http://127.0.0.1:\d+ ...\n", run.stdout)
