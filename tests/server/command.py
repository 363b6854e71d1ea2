"""``mlx-mtp serve`` as its users start it, on a tiny random model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.tiny import save_tiny_pair

ROOT = Path(__file__).parents[2]
LOAD_S = 300  # how long loading may take where the machine is busy


class Served:
    """A running server.

    Attributes:
        process: the server's own process.
        url: where it is.
        client: an HTTP client for it.
    """

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=LOAD_S)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, where there is one."""
        path = Path(f"/proc/{self.process.pid}/task")
        pids = [pid for task in path.glob("*") for pid in (task / "children").read_text().split()]
        return int(pids[0]) if pids else None

    @property
    def server_pid(self) -> int:
        """Process id of the server."""
        return self.process.pid

    def wait_for(self, status: str, *, seconds: float = LOAD_S) -> float:
        """Wait until /health says that; return how long it took."""
        began = time.monotonic()
        while self.client.get("/health").json()["status"] != status:
            assert time.monotonic() - began < seconds
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.02)
        return time.monotonic() - began

    def chat(self, text: str, **more: Any) -> httpx.Response:
        """Send one message to /v1/chat/completions."""
        messages = [{"role": "user", "content": text}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **more})


def command(*arguments: str) -> list[str]:
    """The command line of ``mlx-mtp serve``."""
    return [sys.executable, "-m", "mlx_mtp", "serve", *arguments]


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[Served]:
    """Run ``mlx-mtp serve`` on a tiny random model with an adapter, at a free port.

    Args:
        folder: for the model and for what is cached.
        arguments: more of the command line.
    """
    model, adapter = save_tiny_pair(folder)
    pair = ("--model", str(model), "--adapter-path", str(adapter), "--model-name", "tiny")
    with serving(folder, *pair, *arguments) as server:
        yield server


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Served]:
    """Run ``mlx-mtp serve`` on the model of the arguments, by default the default model."""
    given = command("--port", "0", "--layout", "quadratic", *arguments)
    environment = os.environ | {"MLX_MTP_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(given, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Listening on http://"), line
        server = Served(process, line.split()[2])
        server.wait_for("ok")
        yield server
        server.client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
