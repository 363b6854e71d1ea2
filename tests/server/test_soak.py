"""The program that wears a server out notices what it is there for; a server keeps no requests."""

from __future__ import annotations

import collections
import gc
import sys
import threading
import time
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from tests.server.host import hosted, listening
from tests.server.soak_clients import soak
from tests.server.soak_requests import fuzz
from tests.server.soak_watch import summary, told, watch, watching

FAKE: dict[str, Any] = {
    "engine": {"queue_size": 256}, "body_timeout_s": 5.0, "header_timeout_s": 2.5,
}  # fmt: skip


def test_percentiles_are_values_that_occurred():
    assert summary([5.0]) == {"median": 5.0, "p99": 5.0, "most": 5.0}
    assert summary([float(at) for at in range(1, 201)]) == {
        "median": 100.0, "p99": 198.0, "most": 200.0,
    }  # fmt: skip
    assert summary([]) == {}


def test_the_watcher_sees_a_held_up_loop_and_a_wrong_status():
    asked = 0

    async def health(request):
        nonlocal asked
        asked += 1
        if asked == 2:
            time.sleep(0.4)
        return PlainTextResponse("", 503 if asked == 3 else 200)

    with listening(Starlette(routes=[Route("/health", health)])) as port:
        found = told(watching("127.0.0.1", port, 1.0))
    assert found["asked"] == asked > 3
    assert found["total_ms"]["most"] >= found["answer_ms"]["most"] >= 400
    assert found["bad"] == {"503": 1}


def _objects() -> collections.Counter[str]:
    gc.collect()
    return collections.Counter(type(each).__name__ for each in gc.get_objects())


@pytest.mark.parametrize("requests", [220, pytest.param(2000, marks=pytest.mark.soak)])
def test_nothing_is_kept_of_requests(requests):
    with hosted() as host:
        host.wait_for("ok")
        with httpx.Client(base_url=host.url, timeout=60) as client:

            def ask(times: int) -> None:
                for at in range(times):
                    messages = [{"role": "user", "content": f"number {at}"}]
                    body = {"messages": messages, "stream": at % 2 == 0}
                    assert client.post("/v1/chat/completions", json=body).status_code == 200

            ask(150)  # asyncio keeps a hundred or two of timers that were cancelled
            before = _objects()
            ask(requests)
            more = _objects() - before
    kept = {name: count for name, count in more.items() if count >= 200}
    assert kept == {}


def test_nothing_is_kept_of_connections():
    with hosted() as host:
        host.wait_for("ok")
        for _ in range(30):
            watch(*host.address, seconds=0.0001)
        deadline = time.monotonic() + 5
        while (left := _objects()["Bound"]) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert left <= 1


@pytest.mark.slow
def test_requests_are_the_same_whatever_comes_back_first():
    with hosted(**FAKE) as host:
        host.wait_for("ok")
        first, second = (fuzz(host, requests=104, seed=3) for _ in range(2))
    for report in (first, second):
        assert report["bad"] == [] and report["restarts"] == 0
        report["statuses"].pop("mutated and left", None)  # what comes first is chance
    assert first == second
    assert {"deep", "many", "declared 10 GB", "generated", "mutated"} <= first["statuses"].keys()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_lost_and_a_crossed_reply_are_noticed():
    answers = iter(range(10**6))
    lock = threading.Lock()

    async def wrong(request):
        await request.body()
        with lock:
            number = next(answers)
        content = {"choices": [{"message": {"content": "mine" if number < 20 else "yours"}}]}
        return JSONResponse(content, 500 if number == 20 else 200)

    async def health(request):
        return PlainTextResponse("")

    routes = [
        Route("/v1/chat/completions", wrong, methods=["POST"]),
        Route("/health", health),
    ]
    # half of the requests ask for a stream, which is no stream here and counts as lost
    with listening(Starlette(routes=routes)) as port, hosted() as host:
        host.url = f"http://127.0.0.1:{port}"
        report = soak(host, clients=1, seconds=1.5)
    assert report["crossed"] > 0 and report["lost"] >= 1 and report["why"]
    assert report["server_growth"] is not None and report["reply_ms"]["most"] > 0
