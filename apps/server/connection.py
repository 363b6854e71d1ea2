"""A connection: how long a client may take to ask, and to take what it asked for."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_mtp.apps.server.metrics import Metrics
from mlx_mtp.apps.server.settings import Settings

SEND_BUFFER_BYTES = 2**15
_LOOKS = 4  # at what a client has taken, by the time that it is given


def protocol_class(settings: Settings, metrics: Metrics) -> Any:
    """uvicorn's protocol, less patient with clients that keep it waiting.

    One that does not finish its first headers is left, and so is one that takes no byte for
    ``settings.send_timeout_s`` while some are ready for it; to its request it has gone.

    Args:
        settings: of the server.
        metrics: counts the latter.
    """

    class Bound(_Impatient):
        _given = settings
        _counted = metrics

    return Bound


class _Impatient(H11Protocol):
    _given: Settings
    _counted: Metrics
    _look: asyncio.TimerHandle | None = None
    _idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        _hold_little(transport)
        self._idle = self.loop.call_later(self._given.header_timeout_s, self._leave_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_no_more()
        if self._idle is not None:  # it would hold what is left of the connection so long
            self._idle.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client takes less than there is."""
        super().pause_writing()
        self._look_later(self.transport.get_write_buffer_size(), _LOOKS)

    def resume_writing(self) -> None:
        """It has taken everything."""
        self._look_no_more()
        super().resume_writing()

    def _look_later(self, left: int, looks: int) -> None:
        self._look_no_more()
        wait_s = self._given.send_timeout_s / _LOOKS
        self._look = self.loop.call_later(wait_s, self._look_at, left, looks)

    def _look_at(self, left: int, looks: int) -> None:
        now_left = self.transport.get_write_buffer_size()
        if now_left < left:
            self._look_later(now_left, _LOOKS)
        elif looks > 1:
            self._look_later(left, looks - 1)
        else:
            self._counted.stalled.inc()
            self.transport.abort()

    def _look_no_more(self) -> None:
        if self._look is not None:
            self._look.cancel()

    def _leave_if_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _hold_little(transport: Any) -> None:
    """Keep buffers small: what they hold looks taken, however long the client reads nothing."""
    transport.set_write_buffer_limits(high=0)
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
