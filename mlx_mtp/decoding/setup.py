"""From the arguments of ``decode`` to a request: checks and defaults."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.limits import check_ids, max_draft_tokens, max_new_tokens
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.sampling import LogitsProcessor, Sampler, Sampling
from mlx_mtp.drafting.drafter import NoDrafter
from mlx_mtp.drafting.make import Answer, answer_sources, make_drafters
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.plan import MASK, TREE
from mlx_mtp.planning.planner import make_planner

Progress = Callable[[int, int], None]


def progress_of(callback: Progress | None) -> Progress:
    """Return a callback that also reports the last id but one, which mlx-lm computes apart."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if callback is not None:
            if done == total > 1 and reported < total - 1:
                callback(total - 1, total)
            callback(done, total)
        reported = done

    return report


def drafter_sources(
    model: MTPModel, config: GenerationConfig, draft_model: MTPModel | None = None
) -> tuple[str, ...]:
    """The drafters of an answer, by name; none for plain decoding.

    Args:
        model: the model.
        config: the settings of the answer.
        draft_model: in place of the model's own draft model.

    Raises:
        ValueError: the model lacks what the chosen drafter needs.
    """
    return answer_sources(
        model,
        drafter=config.drafter,
        layout=config.layout,
        lookup=config.lookup,
        max_drafts=config.num_draft_tokens,
        draft_model=draft_model or model.draft_model,
    )


def make_request(
    model: MTPModel,
    prompt: Sequence[int],
    config: GenerationConfig | None = None,
    *,
    sampling: Sampling | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    stop_ids: Collection[int] = (),
    cache: MTPCache | None = None,
    cached_ids: Sequence[int] = (),
    lookup_ids: Sequence[Sequence[int]] = (),
    draft_model: MTPModel | None = None,
    speculation: Speculation | None = None,
    explain: Callable[[str], None] | None = None,
    **settings: Any,
) -> Request:
    """Make a request.

    Args:
        model: the model.
        prompt: ids that are not in the cache yet, at least one.
        config: lengths, layout, seed; its fields may also be given as keywords (``max_tokens=``).
        sampling: how tokens are drawn; greedy by default.
        sampler: instead of ``sampling``, a function as in mlx-lm: log-probabilities ``[1, V]`` to
            a token ``[1]``.  A draft is accepted if it is the token drawn.
        logits_processors: more processors in mlx-lm's form, applied along the drafted prefix.
        stop_ids: ids that end the text; the stop id itself is emitted last.
        cache: caches to continue with, updated in place.
        cached_ids: the ids in ``cache``, where lookup and processors should see them too.
        lookup_ids: texts apart from the prompt that drafts are looked up in.
        draft_model: proposes drafts in place of the model's own draft model, if it has one.
        speculation: cost and acceptance estimates of ``"auto"``, updated in place; default
            estimates if omitted.  Sampling with a seed uses a copy in its initial state, so that
            results are repeatable.
        explain: called with a line about every step.
        settings: fields of ``config``.

    Raises:
        ValueError: an argument is out of range; raised before any work.
    """
    config = replace(config or GenerationConfig(), **settings)
    target = Target.of(sampling, sampler, logits_processors, seed=config.seed)
    check_ids(model, prompt, target.sampling, lookup_ids)
    draft_model = draft_model or model.draft_model
    sources = drafter_sources(model, config, draft_model)
    k = 0
    if MASK in sources:
        k = max_draft_tokens(model, config.num_draft_tokens, draft_model)
    known = speculation or Speculation.guess(k)
    if config.seed is not None and not target.sampling.greedy:
        known = known.repeatable()  # drawn ids depend on the steps, so these must come again
    planner = make_planner(
        config.layout,
        num_draft_tokens=k,
        max_drafts=config.num_draft_tokens,
        max_rows=config.max_rows,
        speculation=known,
    )
    if explain and config.layout == "auto" and known.costs.curve.doubt:
        explain(f"costs: {known.costs.curve.doubt}")
    cache = model.make_cache() if cache is None else cache
    cache.begin_answer()
    room = max_new_tokens(model, cache.offset + len(prompt), config.max_tokens)
    seed = config.seed
    if seed is None:
        seed = cast(int, mx.random.randint(0, 2**31 - 1).item())
    ids = [int(token) for token in (*cached_ids, *prompt)]
    answer = Answer(
        model=model,
        ids=ids,
        num_prompt=len(prompt),
        cache=cache,
        distribution=target.sampling.distribution,
        speculation=known,
        trees=_uses_trees(config, target, cache),
        max_drafts=config.num_draft_tokens,
        lookup_ids=[list(map(int, text)) for text in lookup_ids],
        draft_model=draft_model,
        num_before=cache.offset - len(cached_ids),
        prefill_step_size=config.prefill_step_size,
    )
    drafters = make_drafters(sources, answer)
    return Request(
        ids=ids,
        num_prompt_left=len(prompt),
        room=room,
        cache=cache,
        target=target,
        planner=planner,
        costs=known.costs,
        masks=next((each for each in drafters if each.source == MASK), NoDrafter()),
        drafters=drafters,
        key=mx.random.key(seed),
        stop_ids=frozenset(stop_ids),
        prefill_step_size=config.prefill_step_size,
        seed=config.seed or 0,
        explain=explain,
    )


def _uses_trees(config: GenerationConfig, target: Target, cache: MTPCache) -> bool:
    """Whether drafts may branch.

    When tokens are drawn, layout auto keeps to chains, whose drafts are drawn too: rejection
    sampling accepts them more often than the likeliest tokens are drawn.
    """
    is_greedy = target.sampling.greedy and target.sampler is None
    return cache.supports_trees and (config.layout == TREE or config.layout == "auto" and is_greedy)
