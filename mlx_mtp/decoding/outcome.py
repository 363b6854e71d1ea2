"""What a step gives: what was accepted, brought to the host with the new drafts in one sync."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlx_mtp.drafting.drafter import CommittedStep, Drafts
from mlx_mtp.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Outcome:
    """The output of a step, fully evaluated; the cache then contains all rows.

    Attributes:
        tokens: accepted drafts, then the bonus token; none of a prompt chunk.
        last_node: the last accepted draft, counted from 1, or 0; in a chain their number.
        logits: processed logits of ``tokens``, ``[len(tokens), V]``.
        drafts: what the drafter proposed.
        hidden: final hidden states of the ordinary rows, ``[num_ordinary, D]``; not evaluated.
        ms: duration; NaN in a batch.
        error: what a logits processor or sampler raised; the answer cannot continue then.
    """

    tokens: list[int] = field(default_factory=list)
    last_node: int = 0
    logits: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))
    drafts: Drafts = field(default_factory=Drafts.none)
    hidden: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))
    ms: float = math.nan
    error: Exception | None = None

    @property
    def num_accepted(self) -> int:
        """Number of accepted drafts."""
        return max(len(self.tokens) - 1, 0)

    def committed(self, plan: Plan, next_ids: Sequence[int]) -> CommittedStep:
        """The step as drafters see it; ``next_ids`` follow the ordinary rows that stay."""
        return CommittedStep(
            layout=plan.layout,
            source=plan.source,
            last_node=self.last_node,
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


class Verdict(NamedTuple):
    """What was accepted, on the device: tokens ``[d+1]``, num_accepted, logits ``[d+1, V]``."""

    tokens: mx.array
    num_accepted: mx.array
    logits: mx.array
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Submitted:
    """Steps that the device runs while the host goes on.

    Attributes:
        verdicts: of each step; none of a prompt chunk.
        drafts: what the drafters proposed.
        hidden: final hidden states of the ordinary rows of each step, ``[num_ordinary, D]``.
        ids: what ``evaluate`` returned; of a prompt chunk what the cache has.
        began: when the steps began, by ``time.perf_counter``.
    """

    verdicts: list[Verdict]
    drafts: list[Drafts]
    hidden: list[mx.array]
    ids: list[Any]
    began: float

    def outcomes(self) -> list[Outcome]:
        """Wait for the device and read the ids: the one host sync of the steps."""
        if not self.verdicts:
            mx.eval(self.ids)
            return [Outcome(hidden=self.hidden[0])]
        fetched = [cast(list[int], ids.tolist()) for ids in self.ids]
        ms = (time.perf_counter() - self.began) * 1e3 if len(fetched) == 1 else math.nan
        parts = zip(self.verdicts, self.drafts, fetched, self.hidden, strict=True)
        return [_outcome(*part, ms) for part in parts]


def evaluate(verdicts: Sequence[Verdict], drafts: Sequence[Drafts]) -> list[mx.array]:
    """Let the device compute, for each step, num_accepted, tokens and draft ids in one array."""
    pairs = zip(verdicts, drafts, strict=True)
    ids = [mx.concatenate([v.num_accepted[None], v.tokens, d.tokens]) for v, d in pairs]
    mx.async_eval(ids, [(each.candidates, each.probs) for each in drafts])
    return ids


def _outcome(
    verdict: Verdict, drafts: Drafts, fetched: list[int], hidden: mx.array, ms: float
) -> Outcome:
    """Put a step's evaluated arrays into its outcome."""
    if verdict.error is not None:
        return Outcome(error=verdict.error)
    num_accepted, *ids = fetched
    end, drafts = num_accepted + 1, replace(drafts, host_ids=ids[len(verdict.tokens) :])
    return Outcome(ids[:end], num_accepted, verdict.logits[:end], drafts, hidden, ms)
