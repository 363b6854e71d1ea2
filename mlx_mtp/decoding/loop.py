"""The loop: plan a step, run it, commit its outcome.  Token ids in, token ids out.

Every step is one forward over a ``StepLayout`` and one host sync.  Prompt chunks are steps, and
plain decoding is the layout without drafts and masks, so speculation can only change the speed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import Progress, make_request, progress_of
from mlx_mtp.decoding.step import run
from mlx_mtp.model.mtp_model import MTPModel

__all__ = ["StepResult", "decode"]
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
    return _decode(model, request, progress_of(prompt_progress_callback))


def _decode(model: MTPModel, request: Request, progress: Progress) -> Steps:
    num_prompt = request.num_prompt_left
    progress(0, num_prompt)
    while not request.finished:
        num_left = request.num_prompt_left
        [outcome] = run(model, [request.plan()])
        result = request.commit(outcome)
        if num_left:
            progress(num_prompt - request.num_prompt_left, num_prompt)
        if result.tokens:
            yield result
