"""Several requests at once: each turn runs the next step of every one, in batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence

from mlx_mtp.decoding.grouping import StepGrouper
from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.step import run
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation


def decode_together(
    model: MTPModel,
    requests: Sequence[Request],
    *,
    speculation: Speculation,
    max_answers: int = 32,
) -> Generator[tuple[int, StepResult, float], None, None]:
    """Decode several requests of a model, in batched steps where these are faster.

    Args:
        model: the model.
        requests: of ``make_request``.  One whose ``finish_reason`` the caller sets ends there.
        speculation: what the model's steps cost.
        max_answers: maximum number of requests in progress.

    Yields:
        The index of a request, its step, and the share of the forward's duration in ms.
    """
    grouper = StepGrouper(model, speculation)
    waiting = deque(range(len(requests)))
    active: list[int] = []
    while active or waiting:
        while waiting and len(active) < max_answers:
            active.append(waiting.popleft())
        steps = [requests[i].plan() for i in active]
        for group in grouper.groups(steps):
            began = time.perf_counter()
            outcomes = run(model, [steps[i] for i in group])
            ms = (time.perf_counter() - began) * 1e3 / len(group)
            pairs = [(active[i], outcome) for i, outcome in zip(group, outcomes, strict=True)]
            # All before the first is yielded, and those that raise last: whatever ends this
            # generator, no cache is left with rows of a step that nobody has taken in.
            pairs.sort(key=lambda pair: pair[1].error is not None)
            for i, result in [(i, requests[i].commit(outcome)) for i, outcome in pairs]:
                yield i, result, ms
        active = [i for i in active if not requests[i].finished]
