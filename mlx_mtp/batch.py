"""Several prompts at once: ``batch_generate``, with mlx-lm's arguments and result.

The answers' next steps run in one forward where that is faster than one forward each, as in the
server.  Every answer is the one that ``generate`` gives.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.generate import (
    TextStream,
    answer_settings,
    cache_for,
    encode_prompt,
    finish_list,
    follow,
    limit_reasoning,
    on_stream,
    usable,
    wired_memory,
    wrapped,
)
from mlx_mtp.text.detokenizer import detokenizer_for

if TYPE_CHECKING:
    from mlx_lm.generate import BatchResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.decoding.outcome import StepResult
    from mlx_mtp.decoding.request import Request
    from mlx_mtp.model.caches.mtp_cache import MTPCache
    from mlx_mtp.model.mtp_model import MTPModel


def batch_generate(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[str | Sequence[int] | mx.array],
    prompt_caches: Sequence[Any] | None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    completion_batch_size: int = 32,
    prefill_batch_size: int = 8,
    stop_tokens: None = None,
    stream: Any = None,
    **options: Any,
) -> BatchResponse:
    """Answer several prompts.

    Args:
        model: from ``load``.
        tokenizer: from ``load``.
        prompts: texts or ids.
        prompt_caches: one per prompt, as ``prompt_cache`` of ``stream_generate``; not changed.
        max_tokens: maximum number of ids of each answer, or one number for each prompt.
        verbose: print progress and statistics.
        return_prompt_caches: return mlx-lm's caches with each prompt and its answer.
        return_token_ids: return the ids of the answers, without stop ids.
        return_logprobs: return the log-probabilities of these ids.
        completion_batch_size: maximum number of answers in progress.
        prefill_batch_size: without effect; the prompts are prefilled one after the other.
        stop_tokens: not supported; the tokenizer's end tokens and ``stop`` end an answer.
        stream: MLX stream for the forwards; the default one if omitted.
        options: see ``stream_generate``.

    Returns:
        mlx-lm's ``BatchResponse``: ``texts``, ``stats``, and what was to be returned.

    Raises:
        ValueError: an argument is out of range or does not fit the number of prompts.
    """
    from mlx_lm.generate import BatchResponse
    from mlx_lm.generate_utils import BatchStats

    from mlx_mtp.calibration.stored_costs import speculation_for, store_learned
    from mlx_mtp.decoding.together import decode_together

    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    caches = [None] * len(prompts) if prompt_caches is None else list(prompt_caches)
    for name, values in (("max_tokens", limits), ("prompt_caches", caches)):
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} values for {len(prompts)} prompts")
    if stop_tokens is not None:
        raise ValueError("stop_tokens is not supported: use stop or tokenizer.add_eos_token")
    if completion_batch_size < 1:
        raise ValueError(f"completion_batch_size must be at least 1, got {completion_batch_size}")
    del prefill_batch_size
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list; generate answers a single one")
    model, tokenizer = usable(model), wrapped(tokenizer)
    answers = [
        _Answer(model, tokenizer, prompt, cache, limit, dict(options))
        for prompt, cache, limit in zip(prompts, caches, limits, strict=True)
    ]
    stats = BatchStats(prompt_tokens=sum(answer.num_prompt for answer in answers))
    began, num_done = time.perf_counter(), 0
    _show(verbose, f"Finished processing 0/{len(answers)} ...", end="\r")
    with wired_memory(), on_stream(stream):
        results = decode_together(
            model,
            [answer.request for answer in answers],
            speculation=speculation_for(model),
            max_answers=completion_batch_size,
        )
        for index, result, ms in results:
            answer = answers[index]
            answer.take(result)
            stats.generation_tokens += len(result.tokens)
            stats.generation_steps += bool(result.tokens)
            is_prompt = answer.num_steps <= 1
            stats.prompt_time += ms / 1e3 * is_prompt
            stats.decode_time += ms / 1e3 * (not is_prompt)
            if answer.request.finished:
                num_done += 1
                _show(verbose, f"Finished processing {num_done}/{len(answers)} ...", end="\r")
        made = [answer.caches() for answer in answers] if return_prompt_caches else None
    store_learned(model)
    stats.wall_time = time.perf_counter() - began
    stats.peak_memory = mx.get_peak_memory() / 1e9
    _show(verbose, f"Finished processing {num_done}/{len(answers)}    ")
    _show(verbose, f"Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec")
    _show(
        verbose,
        f"Generation: {stats.generation_tokens} tokens, {stats.generation_tps:.3f} tokens-per-sec",
    )
    _show(verbose, f"Peak memory: {stats.peak_memory:.3f} GB")
    return BatchResponse(
        [answer.text for answer in answers],
        stats,
        made,
        [answer.ids for answer in answers] if return_token_ids else None,
        [answer.logprobs() for answer in answers] if return_logprobs else None,
    )


class _Answer:
    """One prompt of a batch, and what has been generated for it."""

    def __init__(
        self,
        model: MTPModel,
        tokenizer: TokenizerWrapper,
        prompt: str | Sequence[int] | mx.array,
        cache: Any,
        limit: int,
        options: dict[str, Any],
    ) -> None:
        from mlx_mtp.calibration.stored_costs import speculation_for
        from mlx_mtp.decoding.setup import make_request

        config, cache_config = options.pop("config", None), options.pop("cache_config", None)
        options["max_tokens"] = limit
        settings, cache_settings = answer_settings(tokenizer, config, cache_config, options)
        ids = encode_prompt(tokenizer, prompt)
        self.num_prompt = len(ids)
        self.text = ""
        self.ids: list[int] = []
        self.num_steps = 0
        self._model = model
        self._rows: list[mx.array] = []
        self._last_id: int | None = None
        self._stop_ids = tokenizer.eos_token_ids
        self._cache = _independent(cache_for(model, _copies(cache), cache_settings))
        follow(self._cache, prompt, ids)
        detokenizer = detokenizer_for(tokenizer, ids, continued=self._cache.offset > 0)
        self._stream = TextStream(detokenizer, stop=settings.stop, stop_ids=self._stop_ids)
        limit_reasoning(options, tokenizer, ids, settings.thinking_budget)
        self.request: Request = make_request(
            model,
            ids,
            settings,
            stop_ids=self._stop_ids,
            cache=self._cache,
            speculation=speculation_for(model),
            **options,
        )

    def take(self, result: StepResult) -> None:
        """Add the ids of a step up to a stop string."""
        self.num_steps += bool(result.tokens)
        for index, token in enumerate(result.tokens):
            is_last = index == len(result.tokens) - 1
            self._last_id = token
            if token not in self._stop_ids:
                self.ids.append(token)
                self._rows.append(result.logprobs[index, token])
                self.text += self._stream.push(token)
            if is_last and result.finish_reason:
                self.text += self._stream.finish()
            if self._stream.stopped:
                self.request.finish_reason = "stop"
                self._cache.rewind(len(result.tokens) - index - 1)
                return

    def logprobs(self) -> list[float]:
        """Log-probabilities of the ids."""
        return [row.item() for row in self._rows]  # type: ignore[misc]

    def caches(self) -> list[Any]:
        """mlx-lm's caches with the prompt and all ids that were emitted."""
        caches = [layer.to_mlx_lm() for layer in self._cache.layers]
        finish_list(self._model, self._cache, caches, self._last_id)
        return caches


def _copies(caches: Any) -> Any:
    """Copy the objects, though not the arrays, of a list of mlx-lm's caches."""
    return [copy.copy(cache) for cache in caches] if isinstance(caches, list) else caches


def _independent(cache: MTPCache) -> MTPCache:
    """Copy a cache that has rows, so that the caller's stays as it is."""
    return cache.copied() if cache.offset else cache


def _show(verbose: bool, line: str, *, end: str = "\n") -> None:
    if verbose:
        print(f"[batch_generate] {line}", end=end, flush=True)
