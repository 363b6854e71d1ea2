"""One step of an answer, alone or batched with steps of other answers: one forward, one sync."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.batching import forward, head
from mlx_mtp.drafting.drafter import CommittedStep, Drafter, Drafts
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.noise import mask_ids
from mlx_mtp.planning.plan import Plan

HEAD_ROWS = 12  # up to here one head pass over all rows is cheaper than two partial ones


@dataclass(frozen=True, eq=False)
class Step:
    """The input of a step.

    Attributes:
        cache: caches of the answer, to which ``run`` appends all rows.
        layout: the rows.
        context: all ids up to the last pending one; the pending ones are not in the cache yet.
        drafts: drafts to verify, as many as the layout has.
        target: what the emitted ids follow.
        drafter: proposes the next drafts within the step.
        keys: random keys of acceptance and of drafting within the step, ``[2, ...]``.
        seed: of the ids of mask rows, if these are random tokens.
        is_prompt_chunk: whether its rows only go into the cache, and nothing is emitted.
    """

    cache: MTPCache
    layout: StepLayout
    context: list[int]
    drafts: Drafts
    target: Target
    drafter: Drafter
    keys: mx.array
    seed: int = 0
    is_prompt_chunk: bool = False

    def ids(self, config: MTPConfig | None) -> mx.array:
        """Ids of the rows ``[rows]``; see ``mask_ids`` for those of mask rows."""
        pending, layout = self.context[-self.layout.num_pending :], self.layout
        positions = self.cache.offset + layout.mask_positions
        masks = mask_ids(config, layout.mask_offsets, positions, seed=self.seed).tolist()
        if self.drafts.host_ids is not None:
            return mx.array([*pending, *self.drafts.host_ids, *masks], mx.int32)
        parts = [mx.array(pending, mx.int32), self.drafts.tokens, mx.array(masks, mx.int32)]
        return mx.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The output of a step, fully evaluated; the cache then contains all rows.

    Attributes:
        tokens: accepted drafts, then the bonus token; none of a prompt chunk.
        num_accepted: accepted drafts.
        logits: processed logits of ``tokens``, ``[num_accepted + 1, V]``.
        drafts: what the drafter proposed.
        hidden: final hidden states of the ordinary rows, ``[num_ordinary, D]``; not evaluated.
        ms: duration; NaN in a batch.
        error: what a logits processor or sampler raised; the answer cannot continue then.
    """

    tokens: list[int] = field(default_factory=list)
    num_accepted: int = 0
    logits: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))
    drafts: Drafts = field(default_factory=Drafts.none)
    hidden: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))
    ms: float = math.nan
    error: Exception | None = None

    def committed(self, plan: Plan, next_ids: Sequence[int]) -> CommittedStep:
        """The step as drafters see it; ``next_ids`` follow the ordinary rows that stay."""
        return CommittedStep(
            layout=plan.layout,
            source=plan.source,
            num_accepted=self.num_accepted,
            tokens=self.tokens,
            next_ids=next_ids,
            hidden=self.hidden,
            drafts=self.drafts,
        )

    def result(self, plan: Plan, emitted: list[int], finish_reason: str | None) -> StepResult:
        """The step as callers see it; ``emitted`` is ``tokens`` up to the end of the answer."""
        return StepResult(
            tokens=emitted,
            num_draft_tokens=plan.layout.num_draft_tokens,
            num_accepted=min(self.num_accepted, len(emitted)),
            num_rows=plan.layout.num_rows,
            parts=plan.parts,
            finish_reason=finish_reason,
            logits=self.logits[: len(emitted)],
        )


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one step emitted.

    Attributes:
        tokens: emitted ids, accepted drafts then the bonus token, cut after a stop id or at the
            token limit; none of a prompt chunk.
        num_draft_tokens: drafts verified in this step.
        num_accepted: drafts accepted and emitted; never a match after a mismatch or past a stop.
        num_rows: rows of the forward, pending prompt rows of the first step included.
        parts: sources of the verified drafts, in order, with the number of drafts of each.
        finish_reason: ``"stop"``, ``"length"`` or None while the answer continues.
        logits: processed logits of the emitted ids, ``[len(tokens), V]``.
    """

    tokens: list[int]
    num_draft_tokens: int
    num_accepted: int
    num_rows: int
    parts: tuple[tuple[str, int], ...]
    finish_reason: str | None
    logits: mx.array = field(repr=False)

    @property
    def source(self) -> str:
        """Source of the verified drafts, such as "mask" or "mask+lookup"; "" without any."""
        return "+".join(source for source, _ in self.parts)

    @cached_property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the emitted rows, ``[len(tokens), V]``, computed on first use."""
        return self.logits - mx.logsumexp(self.logits, axis=-1, keepdims=True)


class _Verdict(NamedTuple):
    """What was accepted, on the device: tokens ``[d+1]``, num_accepted, logits ``[d+1, V]``."""

    tokens: mx.array
    num_accepted: mx.array
    logits: mx.array
    error: Exception | None = None


def run(model: MTPModel, steps: Sequence[Step]) -> list[Outcome]:
    """Run steps of one model: one forward, one or two passes of the head and one host sync.

    An exception of one answer's logits processors or sampler is its outcome's ``error`` and does
    not concern the others.

    Args:
        model: the model.
        steps: one step, or one per answer if ``can_batch(model)``; no prompt chunk in a batch.
    """
    began = time.perf_counter()
    ids, layouts = [step.ids(model.config) for step in steps], [step.layout for step in steps]
    rows = forward(model, ids, [step.cache for step in steps], layouts)
    if steps[0].is_prompt_chunk:
        mx.eval(steps[0].cache.state)
        return [Outcome(hidden=rows[0])]
    # From here on a step's rows begin with its first verify row: [d + 1 + masks, D].
    hidden = [rows[i][layout.num_pending - 1 :] for i, layout in enumerate(layouts)]
    verify = [hidden[i][: layout.num_draft_tokens + 1] for i, layout in enumerate(layouts)]
    one_pass = sum(map(len, hidden)) <= HEAD_ROWS
    logits = head(model, hidden if one_pass else verify)
    verdicts = [_verify(step, logits[i][: len(verify[i])]) for i, step in enumerate(steps)]
    drafts = _draft(model, steps, verdicts, hidden, logits if one_pass else None)
    fetched = _fetch(list(zip(verdicts, drafts, strict=True)))
    ms = (time.perf_counter() - began) * 1e3 if len(steps) == 1 else math.nan
    ordinary = [rows[i][: layout.num_ordinary] for i, layout in enumerate(layouts)]
    parts = zip(verdicts, drafts, fetched, ordinary, strict=True)
    return [_outcome(*part, ms) for part in parts]


def _verify(step: Step, logits: mx.array) -> _Verdict:
    """Accept drafts by the logits of the verify rows ``[d+1, V]``."""
    try:
        logits = step.target.process(logits, context=step.context, drafts=step.drafts)
        return _Verdict(*step.target.accept(logits, step.drafts, key=step.keys[0]), logits)
    except Exception as error:  # the outcome has no tokens; placeholders keep the shapes
        return _Verdict(mx.zeros(len(logits), mx.int32), mx.array(0), logits, error)


def _draft(
    model: MTPModel,
    steps: Sequence[Step],
    verdicts: Sequence[_Verdict],
    hidden: Sequence[mx.array],
    logits: Sequence[mx.array] | None,
) -> list[Drafts]:
    """Propose the next drafts; ``logits`` of all rows where there was one pass of the head."""
    drafts = [Drafts.none()] * len(steps)
    needed = [s.drafter.rows(s.layout, verdicts[i].num_accepted) for i, s in enumerate(steps)]
    rows = {i: indices for i, indices in enumerate(needed) if indices is not None}
    states = [hidden[i][indices] for i, indices in rows.items()]
    heads = [logits[i][rows[i]] for i in rows] if logits else head(model.frequent or model, states)
    for i, state, mask_logits in zip(rows, states, heads, strict=True):
        step, bonus = steps[i], verdicts[i].tokens[verdicts[i].num_accepted]
        drafts[i] = step.drafter.draft(state, mask_logits, bonus, key=step.keys[1])
    return drafts


def _fetch(pairs: Sequence[tuple[_Verdict, Drafts]]) -> list[list[int]]:
    """The one host sync: num_accepted, tokens and draft ids of each step."""
    ids = [mx.concatenate([v.num_accepted[None], v.tokens, d.tokens]) for v, d in pairs]
    mx.eval(ids, [(drafts.candidates, drafts.probs) for _, drafts in pairs])
    return [cast(list[int], row.tolist()) for row in ids]


def _outcome(
    verdict: _Verdict, drafts: Drafts, fetched: list[int], hidden: mx.array, ms: float
) -> Outcome:
    """Put a step's evaluated arrays into its outcome."""
    if verdict.error is not None:
        return Outcome(error=verdict.error)
    num_accepted, *ids = fetched
    end, drafts = num_accepted + 1, replace(drafts, host_ids=ids[len(verdict.tokens) :])
    return Outcome(ids[:end], num_accepted, verdict.logits[:end], drafts, hidden, ms)
