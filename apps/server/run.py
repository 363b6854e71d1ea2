"""Runs the application: socket, signals and status lines."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.connection import protocol_class
from mlx_mtp.apps.server.hints import LOG
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.drafting.words import in_words
from mlx_mtp.terminal import show

GRACE_S = 1  # for running answers after Ctrl-C


def serve(
    app: ASGIApp,
    engine: Engine,
    settings: Settings,
    *,
    greet: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        app: from ``create_app``.
        engine: the engine of the application.
        settings: where to listen.
        greet: called with the address instead of printing it.

    Raises:
        ValueError: the port is in use, or the model cannot be loaded.
    """
    listener = _listen(settings)
    url = _url(listener)
    config = uvicorn.Config(
        app,
        http=protocol_class(settings, engine.metrics),
        ws="none",
        lifespan="on",
        log_level=settings.log_level.lower(),
        access_log=settings.log_level in ("DEBUG", "INFO"),
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=30,
    )
    LOG.setLevel(settings.log_level)
    server = _Server(config, engine)
    gc.collect()
    gc.freeze()  # objects that exist now stay; collections need not scan them again
    (greet or _greet)(url)
    with listener:
        asyncio.run(_run(server, listener, engine, url, settings))
    if engine.info is None and engine.error:
        raise ValueError(engine.error)


def _greet(url: str) -> None:
    print(f"Listening on {url} ...", flush=True)


async def _run(
    server: _Server, listener: socket.socket, engine: Engine, url: str, settings: Settings
) -> None:
    tasks = [
        asyncio.create_task(_announce(server, engine, url, settings)),
        asyncio.create_task(engine.metrics.watch_loop()),
    ]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()


async def _announce(server: _Server, engine: Engine, url: str, settings: Settings) -> None:
    """Print the model when it is loaded; stop the server if it cannot be."""
    await engine.settled.wait()
    info = engine.info
    if info is None:
        server.should_exit = True
        return
    words = in_words(info.drafters)
    mode = f"drafting with {words}" if words else "plain decoding: one token per step"
    show(f"Serving {info.model} ({mode}) on {url}/v1")


class _Server(uvicorn.Server):
    """Stops cleanly at the first signal, with exit code 0."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.should_exit:  # a second signal; the cancelled lifespan would log a traceback
            self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
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
        in_use = error.errno == errno.EADDRINUSE
        reason = "is in use by another program" if in_use else f"cannot be used: {error.strerror}"
        raise ValueError(f"port {settings.port} of {settings.host} {reason}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
