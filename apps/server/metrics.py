"""Counters for Prometheus; every server has its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_mtp.apps.engine.protocol import Message

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOK_S = 0.1  # how often the event loop is asked how late it is
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LATE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """What is counted.

    Attributes:
        restarts: engines started after the first.
        stalled: connections closed because nothing was taken from them.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"mlx_mtp_{name}", text, labels, registry=registry)

        self._requests = counter("requests", "Requests by path and status.", ("path", "status"))
        self._answers = counter("answers", "Answers by how they ended.", ("reason",))
        self._tokens = counter("tokens", "Tokens emitted.")
        self._steps = counter("steps", "Forwards that emitted tokens.")
        self._drafted = counter("drafts", "Drafts verified.", ("source",))
        self._accepted = counter("drafts_accepted", "Drafts accepted.", ("source",))
        self.restarts = counter("engine_restarts", "Engines started after the first.")
        self.stalled = counter("stalled_clients", "Clients left because they took nothing more.")
        self._queue = Gauge("mlx_mtp_queue_length", "Answers that wait.", registry=registry)
        self._running = Gauge("mlx_mtp_running", "Answers being made.", registry=registry)
        self._first = Histogram(
            "mlx_mtp_time_to_first_token_seconds",
            "From the request to its first token, the queue included.",
            registry=registry,
            buckets=_FIRST_S,
        )
        self._each = Histogram(
            "mlx_mtp_time_per_token_seconds",
            "Between steps, by tokens emitted.",
            registry=registry,
            buckets=_TOKEN_S,
        )

        self._late = Histogram(
            "mlx_mtp_event_loop_late_seconds",
            "How late the event loop came back to something, ten times a second.",
            registry=registry,
            buckets=_LATE_S,
        )

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Say where the lengths are read."""
        self._queue.set_function(waiting)
        self._running.set_function(running)

    async def watch_loop(self) -> None:
        """Note again and again how late the event loop is, until it is cancelled."""
        while True:
            due = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self._late.observe(max(0.0, time.monotonic() - due))

    def group(self, message: Message, *, seconds: float, first: bool) -> None:
        """Count what a step emitted; ``seconds`` after the step before, or after the request."""
        self._tokens.inc(message["tokens"])
        self._steps.inc()
        if message["drafted"]:
            self._drafted.labels(message["source"]).inc(message["drafted"])
            self._accepted.labels(message["source"]).inc(message["accepted"])
        if first:
            self._first.observe(seconds)
        else:
            self._each.observe(seconds / message["tokens"])

    def ended(self, reason: str) -> None:
        """Count an answer that has ended."""
        self._answers.labels(reason).inc()

    def request(self, path: str, status: int) -> None:
        """Count a request; ``path`` is a known one, or "other"."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All counters in Prometheus's text format."""
        return generate_latest(self._registry)
