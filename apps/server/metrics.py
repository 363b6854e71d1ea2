"""Prometheus metrics of one server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_mtp.apps.engine.protocol import CacheCounts, Group, Started
from mlx_mtp.planning.plan import counts_by_source

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CHECK_S = 0.1  # interval of the checks of the event loop's delay
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LATE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counters, gauges and histograms.

    Attributes:
        restarts: engine restarts.
        stalled: connections closed because the client stopped reading.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"mlx_mtp_{name}", text, labels, registry=registry)

        self._requests = counter("requests", "Requests by path and status.", ("path", "status"))
        self._answers = counter("answers", "Answers by finish reason.", ("reason",))
        self._tokens = counter("tokens", "Tokens emitted.")
        self._steps = counter("steps", "Decoding steps.")
        self._drafted = counter("drafts", "Draft tokens verified.", ("source",))
        self._accepted = counter("drafts_accepted", "Draft tokens accepted.", ("source",))
        self._prompts = counter(
            "prompt_cache_requests",
            "Prompts by where the longest part of their beginning was: memory, files, or miss.",
            ("result",),
        )
        self._prompt_tokens = counter(
            "prompt_tokens", "Tokens of prompts by source: memory, files, or computed.", ("source",)
        )
        self._evicted = counter(
            "prompt_cache_evictions", "Blocks of prompts removed to make room.", ("place",)
        )
        self._cached = Gauge(
            "mlx_mtp_prompt_cache_bytes",
            "Size of the blocks of prompts in memory and in files.",
            ("place",),
            registry=registry,
        )
        self.restarts = counter("engine_restarts", "Engine restarts.")
        self.stalled = counter(
            "stalled_clients", "Clients disconnected because they stopped reading."
        )
        self._queue = Gauge(
            "mlx_mtp_queue_length", "Answers waiting in the queue.", registry=registry
        )
        self._running = Gauge("mlx_mtp_running", "Answers being generated.", registry=registry)
        self._first = Histogram(
            "mlx_mtp_time_to_first_token_seconds",
            "Time from the request to its first token, including the queue.",
            registry=registry,
            buckets=_FIRST_S,
        )
        self._per_token = Histogram(
            "mlx_mtp_time_per_token_seconds",
            "Time between steps per emitted token.",
            registry=registry,
            buckets=_TOKEN_S,
        )

        self._late = Histogram(
            "mlx_mtp_event_loop_late_seconds",
            "Delay of the event loop, measured ten times per second.",
            registry=registry,
            buckets=_LATE_S,
        )

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Set the functions that return the queue length and the number of running answers."""
        self._queue.set_function(waiting)
        self._running.set_function(running)

    async def watch_loop(self) -> None:
        """Record the event loop's delay regularly, until cancelled."""
        while True:
            due = time.monotonic() + CHECK_S
            await asyncio.sleep(CHECK_S)
            self._late.observe(max(0.0, time.monotonic() - due))

    def group(self, message: Group, *, seconds: float, first: bool) -> None:
        """Count a step; ``seconds`` since the previous step, or since the request for the first."""
        self._tokens.inc(message.tokens)
        self._steps.inc()
        for source, drafted, accepted in counts_by_source(message.parts, message.accepted):
            self._drafted.labels(source).inc(drafted)
            self._accepted.labels(source).inc(accepted)
        if first:
            self._first.observe(seconds)
        else:
            self._per_token.observe(seconds / message.tokens)

    def started(self, message: Started) -> None:
        """Count the tokens of a prompt by their source."""
        read, cached = message.read_tokens, message.cached_tokens
        result = "miss" if not cached else "files" if 2 * read > cached else "memory"
        self._prompts.labels(result).inc()
        self._prompt_tokens.labels("memory").inc(cached - read)
        self._prompt_tokens.labels("files").inc(read)
        self._prompt_tokens.labels("computed").inc(message.prompt_tokens - cached)

    def cache(self, counts: CacheCounts) -> None:
        """Note the state of the prefix cache."""
        self._cached.labels("memory").set(counts.memory_bytes)
        self._cached.labels("files").set(counts.file_bytes)
        self._evicted.labels("memory").inc(counts.num_dropped)
        self._evicted.labels("files").inc(counts.num_removed)

    def ended(self, reason: str) -> None:
        """Count an answer by the reason of its end."""
        self._answers.labels(reason).inc()

    def request(self, path: str, status: int) -> None:
        """Count a request; ``path`` is a known path or "other"."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
