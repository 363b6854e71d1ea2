"""One answer in progress: plans its steps and commits their outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.outcome import Outcome, StepResult
from mlx_mtp.decoding.step import Step
from mlx_mtp.drafting.drafter import Drafter, Drafts
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import plain_layout
from mlx_mtp.planning.costs import LiveCosts
from mlx_mtp.planning.plan import Plan
from mlx_mtp.planning.planner import Planner


@dataclass(eq=False, kw_only=True)
class Request:
    """One answer: its ids, caches, planner, drafters and limits.

    Call ``plan``, ``run`` the step, ``commit`` the outcome, until ``finished``.  Between ``commit``
    and the next ``run`` the cache has the prompt and all emitted ids but the last, so the answer
    may be abandoned there.  ``make_request`` makes one.

    Attributes:
        ids: prompt and emitted ids.
        num_prompt_left: ids of the prompt that are not in the cache yet.
        room: tokens that may still be emitted.
        cache: the caches.
        target: what the emitted ids follow.
        planner: plans the steps.
        costs: of steps on this machine.
        masks: drafts from mask rows in the same forward.
        drafters: everything that proposes drafts, ``masks`` too where there are any.
        key: random key, split for every step.
        stop_ids: ids that end the answer.
        prefill_step_size: maximum rows of a prompt chunk.
        seed: of the ids of mask rows, if these are random tokens.
        explain: called with a line about every step.
        current: the plan of the step that runs.
        offset: rows in the cache before that step.
        finish_reason: ``"stop"`` or ``"length"`` at the end.
    """

    ids: list[int]
    num_prompt_left: int
    room: int
    cache: MTPCache
    target: Target
    planner: Planner
    costs: LiveCosts
    masks: Drafter
    drafters: Sequence[Drafter]
    key: mx.array
    stop_ids: frozenset[int]
    prefill_step_size: int
    seed: int = 0
    explain: Callable[[str], None] | None = None
    current: Plan = field(default_factory=lambda: Plan(plain_layout()))
    offset: int = 0
    finish_reason: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the last id has been emitted."""
        return self.finish_reason is not None

    def plan(self) -> Step:
        """Plan the next step: a chunk of the prompt, or drafts to verify and masks."""
        self.cache.begin_step(self.num_prompt_left)
        self.offset = self.cache.offset
        rest = self.cache.rest_after_chunk(self.num_prompt_left, self.prefill_step_size)
        if rest:
            self.current = Plan(plain_layout(num_pending=self.num_prompt_left - rest))
            parts = (self.ids[:-rest], Drafts.none(), self.target, self.masks, self.key)
            return Step(self.cache, self.current.layout, *parts, is_prompt_chunk=True)
        self.current = plan = self.choose()
        self.key, propose_key, *keys = mx.random.split(self.key, 4)
        drafts = self._propose(plan, propose_key)
        parts = (self.ids, drafts, self.target, self.masks, mx.stack(keys))
        row_ms = self.costs.forward_ms(self.cache.offset) if plan.layout.num_masks else None
        return Step(self.cache, plan.layout, *parts, seed=self.seed, row_ms=row_ms)

    def choose(self) -> Plan:
        """Let the planner choose the next step, which follows ``offset`` rows."""
        room = min(self.room, self.cache.rows_until_change or self.room)
        return self.planner.plan(
            num_pending=self.num_prompt_left or 1,
            room=room,
            offers=[drafter.offer(room - 1) for drafter in self.drafters],
            context=self.offset,
        )

    def commit(self, outcome: Outcome) -> StepResult:
        """Take in what the planned step gave: learn, emit, rewind.

        Raises:
            Exception: what a logits processor or the sampler raised in the step.
        """
        if outcome.error is not None:
            raise outcome.error
        layout, tokens = self.current.layout, outcome.tokens
        if self.num_prompt_left:
            self.num_prompt_left -= layout.num_pending
            mx.clear_cache()  # prompt-sized buffers are not needed again
        if tokens:  # none of a prompt chunk
            self._observe(outcome)
            tokens, self.finish_reason = self._cut(tokens)
            kept = layout.rows_to(outcome.last_node)[: layout.num_pending - 1 + len(tokens)]
            self.cache.keep_rows(kept, of=layout.num_rows)
            self.ids = [*self.ids, *tokens]
            self.room -= len(tokens)
        self._let_drafters_commit(outcome, num_emitted=len(tokens))
        return outcome.result(self.current, tokens, self.finish_reason)

    def _propose(self, plan: Plan, key: mx.array) -> Drafts:
        """Let the drafter that the plan chose propose its drafts."""
        if not plan.layout.num_draft_tokens:
            return Drafts.none()
        [drafter] = [each for each in self.drafters if each.source == plan.source]
        if plan.nodes is not None:
            return drafter.propose_tree(plan.nodes)
        return drafter.propose(plan.layout.num_draft_tokens, key=key)

    def _observe(self, outcome: Outcome) -> None:
        """Let the planner learn from a step before its ids are cut."""
        self.planner.observe(
            self.current,
            last_node=outcome.last_node,
            context=self.offset,
            ms=outcome.ms,
        )
        if self.explain:
            self.explain(self.current.report(outcome.num_accepted, outcome.ms))

    def _let_drafters_commit(self, outcome: Outcome, *, num_emitted: int) -> None:
        """Let drafters take note of a step whose ids are in the text and the cache by now."""
        num_kept = self.current.layout.num_pending + max(num_emitted - 1, 0)
        end = len(self.ids) - max(self.num_prompt_left - 1, 0)
        step = outcome.committed(self.current, self.ids[end - num_kept : end])
        for drafter in self.drafters:
            drafter.commit(step)

    def _cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """Cut ids after the first stop id and at the token limit."""
        for count, token in enumerate(tokens[: self.room], start=1):
            if token in self.stop_ids:
                return tokens[:count], "stop"
        return tokens[: self.room], "length" if len(tokens) >= self.room else None
