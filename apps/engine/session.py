"""One answer, as a generator: messages, and steps that are to be run before it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.preparing import Prepared
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.apps.engine.tool_calls import ToolCallReader
from mlx_mtp.calibration.stored_costs import speculation_for, store_learned
from mlx_mtp.decoding.loop import StepResult, decode
from mlx_mtp.decoding.step import Step
from mlx_mtp.generate import TextStream
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.stats import GenerationStats, StatsMeter


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all sessions share.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        prefixes: caches of finished answers.
        texts: what ids look like.
        prefill_step_size: rows of a prompt per forward, between which others have their turn.
        lookup: whether layout "auto" may take drafts from the text so far.
    """

    model: MTPModel
    tokenizer: TokenizerWrapper
    prefixes: PrefixCache
    texts: TokenTexts
    prefill_step_size: int
    lookup: bool = True


def answer(job: Prepared, bench: Bench) -> Generator[Message | Step, None, None]:
    """Answer a job; closing the generator breaks it off, while no step has run that it handed out.

    Yields:
        ``started``, then ``prefill`` for every chunk of a long prompt, a step and its ``group`` by
        turns, ``finished`` at the end.  A step that nobody ran, it runs.
    """
    ids = list(job.ids)
    taken = None if job.fresh else bench.prefixes.take(ids)
    cache, num_cached = taken if taken else (bench.model.make_cache(), 0)
    try:
        yield {"type": "started", "prompt_tokens": len(ids), "cached_tokens": num_cached}
        meter = StatsMeter(
            prompt_tokens=len(ids) - num_cached,
            cached_tokens=num_cached,
            mtp=bench.model.config is not None and job.options["layout"] != "plain",
        )
        for done in _prefill(ids, cache, bench):
            yield {"type": "prefill", "done": done}
        yield from _decode(job, ids, cache, meter, bench)
    except GeneratorExit:  # between two steps, where the cache is whole
        _keep(job, ids, cache, bench)
        raise
    _keep(job, ids, cache, bench)
    store_learned(bench.model)


def _keep(job: Prepared, ids: list[int], cache: MTPCache, bench: Bench) -> None:
    if not job.fresh:
        bench.prefixes.put(ids, cache)


def _prefill(ids: list[int], cache: MTPCache, bench: Bench) -> Iterator[int]:
    """Run the prompt but for its last chunk, which awaits its masks."""
    size = bench.prefill_step_size
    while len(ids) - cache.offset > size:
        start = cache.offset
        cache.begin_step()
        bench.model(mx.array([ids[start : start + size]]), cache=cache)
        mx.eval(cache.state)
        mx.clear_cache()
        yield cache.offset


def _decode(
    job: Prepared, ids: list[int], cache: MTPCache, meter: StatsMeter, bench: Bench
) -> Iterator[Message | Step]:
    """Hand out the steps and what they emit, by which ``ids`` grows."""
    held = cache.offset
    steps = decode(
        bench.model,
        ids[held:],
        cache=cache,
        cached_ids=ids[:held],
        stop_ids=bench.tokenizer.eos_token_ids,
        prefill_step_size=bench.prefill_step_size,
        speculation=speculation_for(bench.model),
        lookup=bench.lookup,
        **job.options,
    )
    text = TextStream(bench.tokenizer.detokenizer, stop=job.stop)
    tools = ToolCallReader(bench.tokenizer, job.tools) if job.tools else None
    with contextlib.closing(steps):
        while (planned := steps.planned()) is not None:
            yield planned
            step = next(steps)
            ids += step.tokens
            meter.add_step(step.num_draft_tokens, source=step.source)
            message = _group(step, text, meter, bench, job)
            reason = "stop" if text.stopped else step.finish_reason
            tail = text.finish() if reason else ""
            message["text"] += tail
            if job.pieces:
                message["pieces"][-1] += tail
            if tools:
                message["text"] = tools.push(message["text"])
                message["text"] += tools.finish() if reason else ""
            yield message
            if reason:
                yield _finished(reason, text, tools, meter)
                return


def _group(
    step: StepResult, text: TextStream, meter: StatsMeter, bench: Bench, job: Prepared
) -> Message:
    """What one step emitted, up to a stop string."""
    pieces, count = [], 0
    for token in step.tokens:
        meter.add_token(from_draft=count < step.num_accepted)
        count += 1
        pieces.append("" if token in bench.tokenizer.eos_token_ids else text.push(token))
        if text.stopped:
            break
    message = {
        "type": "group",
        "text": "".join(pieces),
        "tokens": count,
        "accepted": min(step.num_accepted, count),
        "drafted": step.num_draft_tokens,
        "source": step.source,
    }
    if job.pieces:
        message |= {"pieces": pieces, "ids": step.tokens[:count]}
    if job.top_logprobs is not None:
        logprobs = step.logprobs[:count]
        message["logprobs"] = bench.texts.entries(step.tokens[:count], logprobs, job.top_logprobs)
    return message


def _finished(
    reason: str, text: TextStream, tools: ToolCallReader | None, meter: StatsMeter
) -> Message:
    calls: list[Any] = tools.calls if tools else []
    return {
        "type": "finished",
        "reason": "tool_calls" if calls and reason == "stop" else reason,
        "stop_string": text.stop_string,
        "tool_calls": calls,
        "stats": GenerationStats(**meter.counts()).stats_dict(),
    }
