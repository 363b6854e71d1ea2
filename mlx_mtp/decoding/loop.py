"""The loop: plan a step, run it, commit its outcome.  Token ids in, token ids out.

Every step is one forward over a ``StepLayout`` and one host sync.  Prompt chunks are steps, and
plain decoding is the layout without drafts and masks, so speculation can only change the speed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.grouping import StepGrouper
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import StepResult, run
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation

__all__ = ["StepResult", "decode", "decode_together"]
Progress = Callable[[int, int], None]
Steps = Generator[StepResult, None, None]


def decode(
    model: MTPModel,
    prompt: Sequence[int],
    config: GenerationConfig | None = None,
    *,
    prompt_progress_callback: Progress | None = None,
    **options: Any,
) -> Steps:
    """Decode step by step.

    Args:
        model: the model.
        prompt: ids that are not in the cache yet, at least one.
        config: lengths, layout, seed; its fields may also be given as keywords (``max_tokens=``).
        prompt_progress_callback: called with (rows done, rows in all) during prefill, as mlx-lm
            does: at first, after each chunk, at the last id but one and at the end.
        options: the other arguments of ``make_request``: ``sampling`` or ``sampler``,
            ``logits_processors``, ``stop_ids``, ``cache``, ``cached_ids``, ``speculation``,
            ``explain``.

    Yields:
        Each step that emits ids.  The cache then has the prompt and all emitted ids but the last.

    Raises:
        ValueError: an argument is out of range; raised at the call, before any work.
    """
    request = make_request(model, prompt, config, **options)
    return _decode(model, request, prompt_progress_callback or (lambda *_: None))


def _decode(model: MTPModel, request: Request, progress: Progress) -> Steps:
    num_prompt = request.num_prompt_left
    progress(0, num_prompt)
    while not request.finished:
        num_left = request.num_prompt_left
        step = request.plan()
        if num_left > 1 and not step.is_prompt_chunk:
            progress(num_prompt - 1, num_prompt)
        [outcome] = run(model, [step])
        result = request.commit(outcome)
        if num_left:
            progress(num_prompt - request.num_prompt_left, num_prompt)
        if result.tokens:
            yield result


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
            for i, outcome in zip(group, outcomes, strict=True):
                yield active[i], requests[active[i]].commit(outcome), ms
        active = [i for i in active if not requests[i].finished]
