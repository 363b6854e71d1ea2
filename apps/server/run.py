"""Runs the application: the socket, the signals, the lines that say how it stands."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.connection import protocol_class
from mlx_mtp.apps.server.settings import Settings

GRACE_S = 1  # for running answers after Ctrl-C


def serve(
    app: ASGIApp,
    engine: Engine,
    settings: Settings,
    *,
    greet: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal comes.

    Args:
        app: from ``create_app``.
        engine: the same one.
        settings: where to listen.
        greet: called with the address once it is known, instead of printing a line.

    Raises:
        ValueError: the port is taken, or the model cannot be loaded.
    """
    listener = _listen(settings)
    url = _url(listener)
    config = uvicorn.Config(
        app,
        http=protocol_class(settings, engine.metrics),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=30,
    )
    server = _Server(config, engine)
    gc.collect()
    gc.freeze()  # what is there now stays; no collection need look through it again
    (greet or _greet)(url)
    with listener:
        asyncio.run(_run(server, listener, engine, url, settings))
    if engine.info is None and engine.error:
        raise ValueError(engine.error)
    if fault := _fault(engine, settings):
        raise ValueError(fault)


def _greet(url: str) -> None:
    print(f"Listening on {url} ...", flush=True)


async def _run(
    server: _Server, listener: socket.socket, engine: Engine, url: str, settings: Settings
) -> None:
    beside = [
        asyncio.create_task(_announce(server, engine, url, settings)),
        asyncio.create_task(engine.metrics.watch_loop()),
    ]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in beside:
            task.cancel()


async def _announce(server: _Server, engine: Engine, url: str, settings: Settings) -> None:
    """Say what is served once it is; end the server where it cannot be."""
    await engine.settled.wait()
    info = engine.info
    if info is None or _fault(engine, settings):
        server.should_exit = True
        return
    how = f"k = {info.num_draft_tokens}" if info.adapter else "no MTP adapter: one token per step"
    how = "one token per step, as asked" if settings.layout == "plain" else how
    print(f"Serving {info.model} ({how}) on {url}/v1", flush=True)


def _fault(engine: Engine, settings: Settings) -> str:
    """What the settings ask for and the model cannot do; empty where there is nothing."""
    most = engine.info.num_draft_tokens if engine.info else 0
    if most and (settings.num_draft_tokens or 0) > most:
        return (
            f"--num-draft-tokens is {settings.num_draft_tokens}, but the adapter was trained "
            f"for {most}"
        )
    return ""


class _Server(uvicorn.Server):
    """Ends cleanly at the first signal, with exit code 0."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._leave)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _leave(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._engine.refuse_all("the server is shutting down")


def _listen(settings: Settings) -> socket.socket:
    """Open the listening socket."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
    except OSError as error:
        raise ValueError(f"--host {settings.host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken by another program" if taken else f"cannot be used: {error.strerror}"
        raise ValueError(f"port {settings.port} of {settings.host} {reason}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
