"""Timeouts of a connection: for sending the headers and for reading the response."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_mtp.apps.server.metrics import Metrics
from mlx_mtp.apps.server.settings import Settings

SEND_BUFFER_BYTES = 2**15
_CHECKS = 4  # of the write buffer per send timeout


def protocol_class(settings: Settings, metrics: Metrics) -> Any:
    """Return uvicorn's protocol with timeouts for slow clients.

    A client that does not finish its first headers in time is disconnected, and so is one that
    reads nothing for ``settings.send_timeout_s`` while data is pending; its request sees a
    disconnect.

    Args:
        settings: the timeouts.
        metrics: counts clients that stopped reading.
    """

    class Bound(_TimeoutProtocol):
        _settings = settings
        _metrics = metrics

    return Bound


class _TimeoutProtocol(H11Protocol):
    _settings: Settings
    _metrics: Metrics
    _check: asyncio.TimerHandle | None = None
    _idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        _limit_buffers(transport)
        self._idle = self.loop.call_later(self._settings.header_timeout_s, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_checking()
        if self._idle is not None:  # the timer would keep the connection's objects alive
            self._idle.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than data is written."""
        super().pause_writing()
        self._check_later(self.transport.get_write_buffer_size(), _CHECKS)

    def resume_writing(self) -> None:
        """The client has read everything."""
        self._stop_checking()
        super().resume_writing()

    def _check_later(self, left: int, checks: int) -> None:
        self._stop_checking()
        wait_s = self._settings.send_timeout_s / _CHECKS
        self._check = self.loop.call_later(wait_s, self._check_buffer, left, checks)

    def _check_buffer(self, left: int, checks: int) -> None:
        now_left = self.transport.get_write_buffer_size()
        if now_left < left:
            self._check_later(now_left, _CHECKS)
        elif checks > 1:
            self._check_later(left, checks - 1)
        else:
            self._metrics.stalled.inc()
            self.transport.abort()

    def _stop_checking(self) -> None:
        if self._check is not None:
            self._check.cancel()

    def _close_if_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _limit_buffers(transport: Any) -> None:
    """Keep buffers small: their content counts as read, even if the client reads nothing."""
    transport.set_write_buffer_limits(high=0)
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
