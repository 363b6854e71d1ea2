"""Kills the engine of a server in the middle of answers, and looks how soon that is mended."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
from soak_clients import stream_data

if TYPE_CHECKING:
    from server_command import Served
    from server_host import Host

    Server = Served | Host


def kill_often(server: Server, *, kills: int) -> dict[str, Any]:
    """Kill the engine in the middle of answers, by turns with SIGKILL and SIGSEGV.

    Returns:
        How often; what was not as promised; how long the slowest error and return took, how long
        the model takes to load, and by how much the slowest return exceeded that.
    """
    unclean: list[str] = []
    error_s = return_s = 0.0
    load_s = _load_s(server)
    for at in range(kills):
        number = (signal.SIGKILL, signal.SIGSEGV)[at % 2]
        codes, took_s, back_s = _kill_once(server, number)
        unclean += [f"{number.name}: {code}" for code in codes if code != "engine_unavailable"]
        error_s, return_s = max(error_s, took_s), max(return_s, back_s)
    load_s = max(load_s, _load_s(server))  # a busy machine may have become a quiet one, or not
    return {
        "kills": kills,
        "unclean": unclean,
        "error_s_most": round(error_s, 2),
        "return_s_most": round(return_s, 2),
        "load_s": load_s,
        "return_beyond_load_s": round(max(0.0, return_s - load_s), 2),
    }


def _kill_once(server: Server, number: signal.Signals) -> tuple[list[str], float, float]:
    """Kill once; return the codes of the errors, when the last came, when there was an engine."""
    emitted = _metric(server, "mlx_mtp_tokens_total")
    with ThreadPoolExecutor(2) as pool:
        asks = [pool.submit(_dying, server, streamed) for streamed in (True, False)]
        while _metric(server, "mlx_mtp_running") < 2:
            time.sleep(0.02)
        while _metric(server, "mlx_mtp_tokens_total") <= emitted:
            time.sleep(0.02)
        time.sleep(0.2)
        killed = time.monotonic()
        _kill_engine(server, number)
        ends = [each.result() for each in asks]
    server.wait_for("ok")
    back_s = time.monotonic() - killed
    return [code for code, _ in ends], max(ended for _, ended in ends) - killed, back_s


def _dying(server: Server, streamed: bool) -> tuple[str, float]:
    """Ask for an answer that will be cut; return the code of the error and when it came."""
    messages = [{"role": "user", "content": "slow"}]  # the fake engine never finishes that
    body = {"messages": messages, "max_tokens": 4000, "stream": streamed}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    ended = time.monotonic()
    if not streamed or reply.status_code != 200:  # a stream that had not begun is refused whole
        code = reply.json().get("error", {}).get("code", "an answer")
        return (code if reply.status_code == 503 else f"{reply.status_code} {code}"), ended
    last = json.loads(stream_data(reply.text)[-1])
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


def _metric(server: Server, name: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _kill_engine(server: Server, number: signal.Signals) -> None:
    pid = server.engine_pid
    assert pid is not None and pid > 1
    os.kill(pid, number)
