"""Kills the engine of a server in the middle of answers, and looks how soon that is mended."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.server.soak_clients import stream_data

if TYPE_CHECKING:
    from tests.server.command import Served
    from tests.server.host import Host

    Server = Served | Host


@dataclass(frozen=True)
class _Kill:
    """What came of a kill: codes of the errors; seconds until the last of them, until another
    engine was started, and until it could answer.
    """

    codes: list[str]
    error_s: float
    start_s: float
    return_s: float


def kill_often(server: Server, *, kills: int) -> dict[str, Any]:
    """Kill the engine in the middle of answers, by turns with SIGKILL and SIGSEGV.

    Returns:
        How often; what was not as promised; how long the slowest error and return took; the longest
        that an engine took to load, and the most that a return took beyond its engine's load.
    """
    unclean: list[str] = []
    found: list[_Kill] = []
    for at in range(kills):
        number = (signal.SIGKILL, signal.SIGSEGV)[at % 2]
        found.append(_kill_once(server, number))
        codes = found[-1].codes
        unclean += [f"{number.name}: {code}" for code in codes if code != "engine_unavailable"]
    return {
        "kills": kills,
        "unclean": unclean,
        "error_s_most": round(max(each.error_s for each in found), 2),
        "return_s_most": round(max(each.return_s for each in found), 2),
        "load_s_most": round(max(each.return_s - each.start_s for each in found), 2),
        "return_beyond_load_s": round(max(each.start_s for each in found), 2),
    }


def _kill_once(server: Server, number: signal.Signals) -> _Kill:
    emitted = _metric(server, "mlx_mtp_tokens_total")
    with ThreadPoolExecutor(2) as pool:
        asks = [pool.submit(_dying, server, streamed) for streamed in (True, False)]
        while _metric(server, "mlx_mtp_running") < 2:
            time.sleep(0.02)
        while _metric(server, "mlx_mtp_tokens_total") <= emitted:
            time.sleep(0.02)
        time.sleep(0.2)
        killed = time.clock_gettime(time.CLOCK_BOOTTIME)
        _kill_engine(server, number)
        ends = [each.result() for each in asks]
    server.wait_for("ok")
    return _Kill(
        codes=[code for code, _ in ends],
        error_s=max(ended for _, ended in ends) - killed,
        start_s=_started(server) - killed,
        return_s=time.clock_gettime(time.CLOCK_BOOTTIME) - killed,
    )


def _started(server: Server) -> float:
    """When the engine's process was started, in seconds since the machine was."""
    stat = Path(f"/proc/{server.engine_pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def _dying(server: Server, streamed: bool) -> tuple[str, float]:
    """Ask for an answer that will be cut; return the code of the error and when it came."""
    messages = [{"role": "user", "content": "slow"}]  # the fake engine never finishes that
    body = {"messages": messages, "max_tokens": 4000, "stream": streamed}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    if not streamed or reply.status_code != 200:  # a stream that had not begun is refused whole
        code = reply.json().get("error", {}).get("code", "an answer")
        return (code if reply.status_code == 503 else f"{reply.status_code} {code}"), ended
    last = json.loads(stream_data(reply.text)[-1])
    return last.get("error", {}).get("code", "no error"), ended


def _metric(server: Server, name: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _kill_engine(server: Server, number: signal.Signals) -> None:
    pid = server.engine_pid
    assert pid is not None and pid > 1
    os.kill(pid, number)
