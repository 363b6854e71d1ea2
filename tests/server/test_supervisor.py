"""The engine's child process: deaths, hangs, the queue, and clients that leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.host import Host, hosted
from tests.server.soak_kills import kill_often
from tests.server.soak_requests import fuzz

SOON_S = 1.0


def wait_until(condition, *, seconds: float = 5) -> float:
    """Wait for something to become true; return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


def metric(host: Host, name: str) -> float:
    lines = host.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"mlx_mtp_{name}"))


def stream(host: Host, text: str):
    """Open a stream of chat completions on a connection of its own."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    return httpx.stream("POST", f"{host.url}/v1/chat/completions", json=body, timeout=20)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_stream_ends_cleanly_when_the_engine_is_killed(number):
    with hosted() as host:
        host.wait_for("ok")
        with stream(host, "slow") as reply:
            lines = reply.iter_lines()
            while "..." not in next(lines):
                pass
            assert host.engine.pid is not None
            os.kill(host.engine.pid, number)
            killed = time.monotonic()
            rest = [line for line in lines if line and "..." not in line]
            assert time.monotonic() - killed < SOON_S
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert host.client.get("/health").json()["status"] in ("restarting", "ok")
        host.wait_for("ok")
        assert time.monotonic() - killed < 5 + SOON_S
        assert host.chat("hello").status_code == 200
        assert metric(host, "engine_restarts_total") == 1


def test_everything_that_waits_gets_503_when_the_engine_dies():
    with hosted(engine={"max_concurrent": 2}) as host:
        host.wait_for("ok")
        with ThreadPoolExecutor(8) as pool:
            slow = [pool.submit(Host.chat, host, "slow") for _ in range(6)]
            wait_until(lambda: metric(host, "queue_length") == 4)
            assert host.engine.pid is not None
            os.kill(host.engine.pid, signal.SIGKILL)
            killed = time.monotonic()
            replies = [each.result(5) for each in slow]
            assert time.monotonic() - killed < SOON_S
        assert {reply.status_code for reply in replies} == {503}
        assert all(reply.headers["retry-after"] == "1" for reply in replies)


def test_a_request_that_kills_the_engine_does_so_once():
    with hosted() as host:
        for _ in range(3):
            host.wait_for("ok")
            reply = host.chat("die")
            assert (
                reply.status_code == 503 and reply.json()["error"]["type"] == "service_unavailable"
            )
        host.wait_for("ok")
        assert host.engine.restarts == 3


def test_a_hung_engine_is_killed():
    with hosted(engine={"timeout_s": 1.5}) as host:
        host.wait_for("ok")
        time.sleep(2)  # an idle engine says nothing and is left alone
        assert host.engine.restarts == 0
        assert host.chat("hang").status_code == 503
        host.wait_for("ok")
        assert host.chat("hello").status_code == 200


def test_health_tells_loading_and_requests_get_503_meanwhile(tmp_path):
    gate = tmp_path / "gate"
    with hosted(model=f"gate {gate}") as host:
        reply = host.client.get("/health")
        assert reply.status_code == 503 and reply.json()["status"] == "loading"
        assert host.chat("hello").status_code == 503
        assert host.client.get("/v1/models").status_code == 503
        gate.touch()
        host.wait_for("ok")
        assert host.client.get("/health").status_code == 200


def test_a_model_that_cannot_be_loaded_is_not_tried_again():
    with hosted(model="broken") as host:
        host.wait_for("broken")
        assert host.engine.error == "no such model" and host.engine.restarts == 0
        assert host.client.get("/health").status_code == 503


def test_the_queue_has_a_bound():
    with hosted(engine={"max_concurrent": 1, "queue_size": 2}) as host:
        host.wait_for("ok")
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(Host.chat, host, "slow", max_tokens=9) for _ in range(3)]
            wait_until(lambda: metric(host, "queue_length") == 2)
            reply = host.chat("hello")
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "queue_full"
            assert host.chat("hello", n=3).status_code == 429
            assert host.client.get("/health").status_code == 200
            assert host.engine.pid is not None
            os.kill(host.engine.pid, signal.SIGKILL)
            assert [each.result(5).status_code for each in waiting] == [503] * 3


def test_more_choices_than_places_are_made_one_after_the_other():
    with hosted(engine={"max_concurrent": 2, "queue_size": 8}) as host:
        host.wait_for("ok")
        choices = host.chat("hello", n=8).json()["choices"]
        assert [each["message"]["content"] for each in choices] == ["hello"] * 8


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_is_broken_off_when_its_client_leaves(streamed):
    with hosted() as host:
        host.wait_for("ok")
        messages = [{"role": "user", "content": "slow"}]
        body = json.dumps({"messages": messages, "stream": streamed})
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(host.address) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            wait_until(lambda: metric(host, "running") == 1)
        assert wait_until(lambda: metric(host, "running") == 0) < SOON_S
        assert metric(host, "answers_total") == 1
        assert host.engine.restarts == 0 and host.chat("hello").status_code == 200


def test_a_client_that_leaves_the_queue_leaves_no_trace():
    with hosted(engine={"max_concurrent": 1}) as host:
        host.wait_for("ok")
        with stream(host, "slow") as first:
            lines = first.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                messages = [{"role": "user", "content": "hello"}]
                httpx.post(
                    f"{host.url}/v1/chat/completions", json={"messages": messages}, timeout=0.3
                )
            wait_until(lambda: metric(host, "queue_length") == 0)
            assert next(lines) == ""
        assert host.chat("hello").status_code == 200


def test_many_clients_get_their_own_replies():
    with hosted(engine={"max_concurrent": 4, "queue_size": 64}) as host:
        host.wait_for("ok")
        stop, slowest = threading.Event(), [0.0]

        def look() -> None:
            with httpx.Client(base_url=host.url) as client:
                while not stop.wait(0.02):
                    began = time.monotonic()
                    assert client.get("/health").status_code == 200
                    slowest[0] = max(slowest[0], time.monotonic() - began)

        watcher = threading.Thread(target=look)
        watcher.start()
        texts = [f"client {at} says {at * at}" for at in range(64)]
        with ThreadPoolExecutor(64) as pool:
            replies = list(pool.map(lambda text: host.chat(text).json(), texts))
        stop.set()
        watcher.join()
        assert [reply["choices"][0]["message"]["content"] for reply in replies] == texts
        assert 0 < slowest[0] < 2  # 0.2 on a quiet machine; server_soak measures it


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.soak)])
def test_the_engine_dies_in_the_middle_of_answers(kills):
    with hosted() as host:
        host.wait_for("ok")
        report = kill_often(host, kills=kills)
    assert report["unclean"] == []
    assert report["error_s_most"] < SOON_S
    assert report["return_beyond_load_s"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=pytest.mark.soak)])
def test_made_up_requests_never_hurt(requests, seed):
    with hosted() as host:
        host.wait_for("ok")
        report = fuzz(host, requests=requests, seed=seed)
    assert report["bad"] == [] and report["restarts"] == 0
