"""The loop: plan a step, run it, commit its outcome.  Token ids in, token ids out.

Every step is one forward over a ``StepLayout`` and one host sync.  Prompt chunks are steps, and
plain decoding is the layout without drafts and masks, so speculation can only change the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.request import Request, StepResult
from mlx_mtp.decoding.step import run
from mlx_mtp.model.mtp_model import MTPModel

__all__ = ["StepResult", "decode"]
Progress = Callable[[int, int], None]


def decode(
    model: MTPModel,
    prompt: Sequence[int],
    config: GenerationConfig | None = None,
    *,
    prompt_progress_callback: Progress | None = None,
    **options: Any,
) -> Generator[StepResult, None, None]:
    """Decode step by step.

    Args:
        model: the model.
        prompt: ids that are not in the cache yet, at least one.
        config: lengths, layout, seed; its fields may also be given as keywords (``max_tokens=``).
        prompt_progress_callback: called with (rows done, rows in all) during prefill.
        sampling: how tokens are drawn; greedy by default.
        sampler: instead of ``sampling``, a function as in mlx-lm: log-probabilities ``[1, V]`` to
            a token ``[1]``.  A draft is accepted if it is the token drawn.
        logits_processors: more processors in mlx-lm's form, applied along the drafted prefix.
        stop_ids: ids that end the text; the stop id itself is emitted last.
        cache: caches to continue with, updated in place.  Whenever a step is yielded they have the
            prompt and all emitted ids but the last.
        cached_ids: the ids in ``cache``, where lookup and processors should see them too.
        speculation: what the planner of ``"auto"`` knows of steps and drafts, updated in place;
            without it the planner starts from a guess.  Sampling with a seed uses a copy of its
            beginnings, so that the same ids come again.
        explain: called with a line about every step.

    Yields:
        Each step that emits ids.

    Raises:
        ValueError: an argument is out of range; raised at the call, before any work.
    """
    names = GenerationConfig.__dataclass_fields__
    settings = {name: options.pop(name) for name in names if name in options}
    config = replace(config or GenerationConfig(), **settings)
    request = Request(model, prompt, config, **options)
    return _decode(model, request, prompt_progress_callback or (lambda *_: None))


def _decode(
    model: MTPModel, request: Request, progress: Progress
) -> Generator[StepResult, None, None]:
    num_prompt = request.num_prompt_left
    progress(0, num_prompt)
    while not request.finished:
        was_prefill = request.num_prompt_left > 0
        [outcome] = run(model, [request.plan()])
        result = request.commit(outcome)
        if was_prefill:
            progress(num_prompt - request.num_prompt_left, num_prompt)
        if result.tokens:
            yield result
