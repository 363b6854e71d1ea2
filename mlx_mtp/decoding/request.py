"""One answer in progress: plans its steps and takes in their outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import mlx.core as mx

from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.limits import check_ids, max_draft_tokens, max_new_tokens
from mlx_mtp.decoding.sampling import LogitsProcessor, Sampler, Sampling
from mlx_mtp.decoding.step import Outcome, Step
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.layout import plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.plan import LOOKUP, Plan
from mlx_mtp.planning.planner import make_planner


@dataclass(frozen=True, eq=False, kw_only=True)
class StepResult:
    """What one step emitted.

    Attributes:
        tokens: emitted ids, accepted drafts then the bonus token, cut after a stop id or at the
            token limit; none of a prompt chunk.
        num_draft_tokens: drafts verified in this step.
        num_accepted: drafts accepted and emitted; never a match after a mismatch or past a stop.
        num_rows: rows of the forward, pending prompt rows of the first step included.
        source: where the verified drafts are from: "mask", "lookup", or "" without any.
        finish_reason: ``"stop"``, ``"length"`` or None while the answer continues.
        logits: processed logits of the emitted ids, ``[len(tokens), V]``.
    """

    tokens: list[int]
    num_draft_tokens: int
    num_accepted: int
    num_rows: int
    source: str
    finish_reason: str | None
    logits: mx.array = field(repr=False)

    @cached_property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the emitted rows, ``[len(tokens), V]``, computed on first use."""
        return self.logits - mx.logsumexp(self.logits, axis=-1, keepdims=True)


class Request:
    """One answer: its ids, caches, planner, drafters and limits.

    Call ``plan``, ``run`` the step, ``commit`` the outcome, until ``finished``.  Between ``commit``
    and the next ``run`` the cache has the prompt and all emitted ids but the last, so the answer
    may be abandoned there.  The arguments are those of ``decode``.

    Attributes:
        ids: prompt and emitted ids.
        cache: the caches.
        num_prompt_left: ids of the prompt that are not in the cache yet.
        finish_reason: of the last step.
    """

    def __init__(
        self,
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
        speculation: Speculation | None = None,
        explain: Callable[[str], None] | None = None,
    ) -> None:
        config = config or GenerationConfig()
        target = Target.of(sampling, sampler, logits_processors, seed=config.seed)
        check_ids(model, prompt, target.sampling)
        k = max_draft_tokens(model, config.num_draft_tokens)
        known = speculation or Speculation.guess(k)
        if config.seed is not None and not target.sampling.greedy:
            known = known.repeatable()  # drawn ids depend on the steps, so these must come again
        layout = config.layout if model.num_draft_tokens else "plain"
        if explain and layout == "auto" and known.costs.curve.disturbed:
            explain(f"costs: {known.costs.curve.doubt}")
        self.ids = [int(token) for token in (*cached_ids, *prompt)]
        self.cache = model.make_cache() if cache is None else cache
        self.num_prompt_left = len(prompt)
        self.finish_reason: str | None = None
        self._room = max_new_tokens(model, self.cache.offset + len(prompt), config.max_tokens)
        self._prefill_step_size = config.prefill_step_size
        self._stop_ids = frozenset(stop_ids)
        self._target = target
        self._planner = make_planner(
            layout, num_draft_tokens=k, speculation=known, lookup=config.lookup
        )
        self._masks = MaskTokenDrafter(model, target.sampling.distribution)
        self._lookup = LookupDrafter(self.ids if self._planner.uses_lookup else None)
        self._plan = Plan(plain_layout())
        seed = config.seed
        if seed is None:
            seed = cast(int, mx.random.randint(0, 2**31 - 1).item())
        self._key = mx.random.key(seed)
        self._explain = explain or (lambda line: None)

    @property
    def finished(self) -> bool:
        """Whether the last id has been emitted."""
        return self.finish_reason is not None

    def plan(self) -> Step:
        """Plan the next step: a chunk of the prompt, or drafts to verify and masks."""
        self.cache.begin_step()
        pending = self.ids[-(self.num_prompt_left or 1) :]
        if len(pending) > self._prefill_step_size:
            chunk = pending[: self._prefill_step_size]
            self._plan = Plan(plain_layout(num_pending=len(chunk)))
            return Step(cache=self.cache, layout=self._plan.layout, pending=chunk)
        self._plan = self._planner.plan(
            num_pending=len(pending),
            num_waiting=self._masks.num_drafts,
            room=min(self._room, self.cache.rows_until_change or self._room),
            context=self.cache.offset,
            num_lookup=self._lookup.num_drafts,
            match=self._lookup.match.length,
        )
        drafter = self._lookup if self._plan.source == LOOKUP else self._masks
        self._key, key = mx.random.split(self._key)
        return Step(
            cache=self.cache,
            layout=self._plan.layout,
            pending=pending,
            drafts=drafter.first(self._plan.layout.num_draft_tokens),
            context=self.ids,
            target=self._target,
            drafter=self._masks,
            key=key,
        )

    def commit(self, outcome: Outcome) -> StepResult:
        """Take in what the planned step gave: learn, emit, rewind.

        Raises:
            Exception: what a logits processor or the sampler raised in the step.
        """
        if outcome.error is not None:
            raise outcome.error
        layout = self._plan.layout
        if self.num_prompt_left:
            self.num_prompt_left -= layout.num_pending
            mx.clear_cache()  # prompt-sized buffers are not needed again
        tokens: list[int] = []
        if outcome.tokens:
            self._learn(outcome)
            tokens, self.finish_reason = self._cut(outcome.tokens)
            self.cache.rewind(layout.num_draft_tokens + layout.num_masks + 1 - len(tokens))
            self.ids = [*self.ids, *tokens]
            self._room -= len(tokens)
        return StepResult(
            tokens=tokens,
            num_draft_tokens=layout.num_draft_tokens,
            num_accepted=min(outcome.num_accepted, len(tokens)),
            num_rows=layout.num_rows,
            source=self._plan.source,
            finish_reason=self.finish_reason,
            logits=outcome.logits[: len(tokens)],
        )

    def _learn(self, outcome: Outcome) -> None:
        """Let planner and drafters learn from a step before its ids are cut."""
        layout, match = self._plan.layout, self._lookup.match
        self._planner.observe(
            self._plan,
            num_accepted=outcome.num_accepted,
            context=self.cache.offset - layout.num_rows,
            ms=outcome.ms,
            match=match.length,
            num_judged=min(len(outcome.tokens), len(match.tokens)),
            num_right=match.num_right(outcome.tokens),
        )
        for drafter in (self._masks, self._lookup):
            drafter.commit(layout, outcome.tokens, outcome.drafts)
        duration = "in a batch" if math.isnan(outcome.ms) else f"{outcome.ms:.1f} ms"
        self._explain(f"{self._plan.line()} -> {outcome.num_accepted} accepted, {duration}")

    def _cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """Cut ids after the first stop id and at the token limit."""
        for count, token in enumerate(tokens[: self._room], start=1):
            if token in self._stop_ids:
                return tokens[:count], "stop"
        return tokens[: self._room], "length" if len(tokens) >= self._room else None
