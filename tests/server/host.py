"""A server over the fake engine, in a thread of the test process, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.app import create_app
from mlx_mtp.apps.server.connection import protocol_class
from mlx_mtp.apps.server.settings import Settings

FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_engine.py")))

HI = [{"role": "user", "content": "hello"}]
PATHS = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HI, "max_tokens": 20},
}


class Recorder:
    """An ASGI application that records the replies of another one.

    Attributes:
        replies: method, path, status, and the start of the body of replies of 400 and more.
    """

    def __init__(self, app: Any) -> None:
        self.replies: list[tuple[str, str, int, str]] = []
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 0

        async def record(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                error = message.get("body", b"").decode()[:300] if status >= 400 else ""
                self.replies.append((scope["method"], scope["path"], status, error))
            await send(message)

        await self._app(scope, receive, record if scope["type"] == "http" else send)


class Host:
    """A running server.

    Attributes:
        url: where it is.
        engine: its engine.
        recorder: the replies so far.
        client: an HTTP client for it.
    """

    def __init__(self, url: str, engine: Engine, recorder: Recorder) -> None:
        self.url = url
        self.engine = engine
        self.recorder = recorder
        self.client = httpx.Client(base_url=url, timeout=20)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def server_pid(self) -> int:
        """Process id of the server: this one."""
        return os.getpid()

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, where there is one."""
        return self.engine.pid

    def wait_for(self, state: str, *, seconds: float = 20) -> float:
        """Wait until the engine has a state; return how long that took."""
        began = time.monotonic()
        while self.engine.state != state:
            assert time.monotonic() - began < seconds, f"still {self.engine.state}"
            time.sleep(0.01)
        return time.monotonic() - began

    def chat(self, text: str, **more: Any) -> httpx.Response:
        """Send one message to /v1/chat/completions."""
        messages = [{"role": "user", "content": text}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **more})


@contextlib.contextmanager
def listening(app: Any, **options: Any) -> Iterator[int]:
    """Serve an application on a free port of this machine, in a thread.

    Args:
        app: what is served.
        options: more for uvicorn's configuration.

    Yields:
        The port.
    """
    config = uvicorn.Config(
        app, ws="none", log_level="error", timeout_graceful_shutdown=1, **options
    )
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def hosted(
    *,
    model: str | None = None,
    engine: dict[str, Any] | None = None,
    command: Sequence[str] = FAKE,
    **settings: Any,
) -> Iterator[Host]:
    """Run a server.

    Args:
        model: what the fake engine loads.
        engine: arguments of ``Engine``.
        command: the program that plays the engine.
        settings: fields of ``Settings``.
    """
    chosen = Settings(**settings)
    made = Engine({"model": model}, command=command, **(engine or {}))
    app, http = create_app(made, chosen), protocol_class(chosen, made.metrics)
    recorder = Recorder(app)
    with listening(recorder, http=http) as port:
        host = Host(f"http://127.0.0.1:{port}", made, recorder)
        try:
            yield host
        finally:
            host.client.close()
