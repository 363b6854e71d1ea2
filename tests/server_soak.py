"""Wears a server out: many clients, made-up requests, a killed engine.

``python -m tests.server_soak --clients 64 --minutes 5 --requests 10000 --kills 50`` prints a report
of each in one line of JSON and ends with exit code 1 where one is bad.  With ``--fake-engine`` no
model is loaded, so that it is the server alone that is worn out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from server_nasty import NASTY_BODIES, NASTY_VALUES, PATHS

if TYPE_CHECKING:
    from server_command import Served
    from server_host import Host

    Server = Served | Host

QUIET_S = 5.0  # after which the engine must be back, beside the time to load the model


def soak(server: Server, *, clients: int, seconds: float) -> dict[str, Any]:
    """Let clients ask again and again, each its own; compare every reply with the first.

    Returns:
        How many replies came, were lost, or were somebody else's; how slow /health was; how the
        memory of both processes grew from a tenth of the time to the end.
    """
    ends = time.monotonic() + seconds
    counts = {"replies": 0, "lost": 0, "crossed": 0}
    lock = threading.Lock()

    def ask(number: int) -> None:
        rng, expected = random.Random(number), None
        with httpx.Client(base_url=server.url, timeout=300) as client:
            while time.monotonic() < ends:
                text, lost = _asked(client, number, streamed=rng.random() < 0.5)
                expected = text if expected is None else expected
                with lock:
                    counts["replies"] += 1
                    counts["lost"] += lost
                    counts["crossed"] += not lost and text != expected

    with ThreadPoolExecutor(clients + 1) as pool:
        health = pool.submit(_watch, server, ends)
        asking = [pool.submit(ask, number) for number in range(clients)]
        for each in asking:
            each.result()
    return {"clients": clients, "seconds": seconds} | counts | health.result()


def _asked(client: httpx.Client, number: int, *, streamed: bool) -> tuple[str, bool]:
    """Ask one question; return the answer and whether it was lost."""
    messages = [{"role": "user", "content": f"I am client {number}, who are you?"}]
    body = {"messages": messages, "max_tokens": 8 + number % 9, "stream": streamed}
    try:
        reply = client.post("/v1/chat/completions", json=body)
        if reply.status_code != 200:
            return "", True
        if not streamed:
            return reply.json()["choices"][0]["message"]["content"], False
        *chunks, done = reply.text.removesuffix("\n\n").split("\n\n")
        found = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
        text = "".join(choice["delta"].get("content") or "" for choice in found)
        return text, done != "data: [DONE]" or found[-1]["finish_reason"] is None
    except (httpx.HTTPError, ValueError, KeyError):
        return "", True


def _watch(server: Server, ends: float) -> dict[str, Any]:
    """Ask for /health all the while; look at the memory early and late."""
    began, slowest, times = time.monotonic(), 0.0, []
    early: list[int] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while (now := time.monotonic()) < ends:
            if not early and now - began > (ends - began) / 10:
                early = _memory(server)
            client.get("/health")
            times.append(time.monotonic() - now)
            slowest = max(slowest, times[-1])
            time.sleep(0.05)
    late = _memory(server)
    growth = [round(after / before - 1, 4) for before, after in zip(early, late, strict=False)]
    times.sort()
    return {
        "health_ms_most": round(1e3 * slowest, 1),
        "health_ms_median": round(1e3 * times[len(times) // 2], 1) if times else None,
        "rss_mb": [round(each / 1e6, 1) for each in late],
        "rss_growth": growth,
    }


def _memory(server: Server) -> list[int]:
    """Resident bytes of the server and its engine."""
    pids = [server.server_pid, server.engine_pid]
    page = os.sysconf("SC_PAGE_SIZE")
    return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids if pid]


def fuzz(server: Server, *, requests: int, seed: int) -> dict[str, Any]:
    """Send requests that schemathesis makes from our OpenAPI document, and mutated ones.

    Returns:
        How many were sent, by status; those answered by a 5xx other than 503, or not at all; how
        often the engine died.
    """
    rng = random.Random(seed)
    statuses: dict[str, int] = {}
    bad: list[str] = []
    before = server.client.get("/health").json()["engine_restarts"]

    def send(method: str, path: str, **given: Any) -> None:
        try:
            status = server.client.request(method, path, **given).status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        if not isinstance(status, int) or (status >= 500 and status != 503):
            bad.append(f"{status} {method} {path} {str(given)[:500]}")

    for method, path, given in _generated(server, requests // 2, seed):
        send(method, path, **given)
    while sum(statuses.values()) < requests:
        path, content = _mutated(rng) if rng.random() < 0.9 else _garbled(rng)
        send("POST", path, content=content)
    after = server.client.get("/health").json()["engine_restarts"]
    total = sum(statuses.values())
    return {"requests": total, "statuses": statuses, "bad": bad, "restarts": after - before}


def _generated(server: Server, count: int, seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests made from the document, some of them against it."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from schemathesis import GenerationMode

    document = server.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    found: list[tuple[str, str, dict[str, Any]]] = []
    results: list[Any] = list(schema.get_all_operations())
    operations = [each.ok() for each in results]
    posts = [each for each in operations if each.method.upper() == "POST"]
    checks: list[Any] = list(HealthCheck)
    quiet = settings(
        max_examples=max(1, count // (2 * len(posts))), deadline=None, database=None,
        suppress_health_check=checks, phases=[Phase.generate],
    )  # fmt: skip
    for operation in posts:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @quiet
            @seeded(seed)
            @given(case=operation.as_strategy(generation_mode=mode))
            def take(case: Any) -> None:
                values = case.as_transport_kwargs(base_url=server.url)
                body = {name: values[name] for name in ("json", "data") if values.get(name)}
                headers = {"Content-Type": "application/json"}
                content = body.get("data")
                text = content if content is not None else json.dumps(_short(body.get("json")))
                found.append(
                    (case.method, case.path, {"content": _bytes(text), "headers": headers})
                )

            take()
    return found


def _short(body: Any) -> Any:
    """Keep made-up answers short: it is the request that is tested."""
    if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
        return body | {"max_tokens": min(body["max_tokens"], 4)}
    return body


def _bytes(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")


def _mutated(rng: random.Random) -> tuple[str, bytes]:
    """A good request with one or two nasty values in it; written as JSON that may be none."""
    path = rng.choice(list(PATHS))
    body = json.loads(json.dumps(PATHS[path]))
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([*body, *FIELDS])
        body[name] = rng.choice(NASTY_VALUES)
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    return path, text.encode("utf-8", "surrogatepass")


def _garbled(rng: random.Random) -> tuple[str, bytes]:
    """A body that is no request, or a good one with bytes changed."""
    path = rng.choice(list(PATHS))
    if rng.random() < 0.3:
        return path, rng.choice(NASTY_BODIES)
    data = bytearray(json.dumps(PATHS[path]).encode())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return path, bytes(data)


FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logit_bias", "logprobs",
    "top_logprobs", "frequency_penalty", "presence_penalty", "repetition_penalty", "stream",
    "stream_options", "mtp", "tools", "tool_choice", "response_format", "model", "echo", "user",
    "metadata", "chat_template_kwargs", "system", "stop_sequences", "instructions", "text",
)  # fmt: skip


def kill_often(server: Server, *, kills: int) -> dict[str, Any]:
    """Kill the engine in the middle of answers, by turns with SIGKILL and SIGSEGV.

    Returns:
        How often; what was not as promised; how long the slowest error and return took, and how
        long the model takes to load.
    """
    unclean: list[str] = []
    slowest_error = slowest_return = 0.0
    load_s = _load_s(server)
    for at in range(kills):
        number = (signal.SIGKILL, signal.SIGSEGV)[at % 2]
        with ThreadPoolExecutor(2) as pool:
            asks = [pool.submit(_dying, server, streamed) for streamed in (True, False)]
            while "mlx_mtp_running 2.0" not in server.client.get("/metrics").text:
                time.sleep(0.02)
            time.sleep(0.2)
            killed = time.monotonic()
            _kill_engine(server, number)
            for each in asks:
                text, ended = each.result()
                slowest_error = max(slowest_error, ended - killed)
                if text != "engine_unavailable":
                    unclean.append(f"{number.name}: {text}")
        server.wait_for("ok")
        slowest_return = max(slowest_return, time.monotonic() - killed)
    return {
        "kills": kills,
        "unclean": unclean,
        "error_s_most": round(slowest_error, 2),
        "return_s_most": round(slowest_return, 2),
        "load_s": load_s,
    }


def _dying(server: Server, streamed: bool) -> tuple[str, float]:
    """Ask for an answer that will be cut; return the code of the error and when it came."""
    messages = [{"role": "user", "content": "slow"}]  # the fake engine never finishes that
    body = {"messages": messages, "max_tokens": 4000, "stream": streamed}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    ended = time.monotonic()
    if not streamed:
        code = reply.json().get("error", {}).get("code", "an answer")
        return (code if reply.status_code == 503 else f"{reply.status_code} {code}"), ended
    last = json.loads(reply.text.strip().split("\n\n")[-1].removeprefix("data: "))
    return last.get("error", {}).get("code", "no error"), ended


def _load_s(server: Server) -> float:
    """How long a restart takes when nothing else happens."""
    before = server.client.get("/health").json()["engine_restarts"]
    began = time.monotonic()
    _kill_engine(server, signal.SIGKILL)
    while server.client.get("/health").json()["engine_restarts"] == before:
        time.sleep(0.01)
    server.wait_for("ok")
    return round(time.monotonic() - began, 2)


def _kill_engine(server: Server, number: signal.Signals) -> None:
    pid = server.engine_pid
    assert pid is not None and pid > 1
    os.kill(pid, number)


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--fake-engine", action="store_true", help="one without a model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from server_command import served
    from server_host import hosted

    good = True
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.fake_engine:
            server: Server = stack.enter_context(hosted(engine={"queue_size": 256}))
            server.wait_for("ok")
        else:
            server = stack.enter_context(served(Path(folder), "--queue-size", "256"))
        if options.minutes:
            report = soak(server, clients=options.clients, seconds=60 * options.minutes)
            print(json.dumps({"soak": report}), flush=True)
            good &= not (report["lost"] or report["crossed"])
        if options.requests:
            report = fuzz(server, requests=options.requests, seed=options.seed)
            print(json.dumps({"fuzz": report}), flush=True)
            good &= not (report["bad"] or report["restarts"])
        if options.kills:
            report = kill_often(server, kills=options.kills)
            print(json.dumps({"kills": report}), flush=True)
            good &= not report["unclean"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
