"""What a step gives: what was accepted, brought to the host with the new drafts in one sync."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_mtp.drafting.drafter import CommittedStep, Drafts, DraftTree
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Outcome:
    """The output of a step, fully evaluated; the cache then contains all rows.

    Attributes:
        tokens: accepted drafts, then the bonus token; none of a prompt chunk.
        last_node: the last accepted draft, counted from 1, or 0; in a chain also their number.
        logits: processed logits of ``tokens``, ``[len(tokens), V]``.
        drafts: what the drafter proposed.
        hidden: final hidden states of the pending rows and the accepted drafts, then perhaps of
            rejected ones, ``[rows, D]``; not evaluated.
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
    """What was accepted, on the device: see ``accept.Accepted``; logits are ``[d+1, V]``."""

    tokens: mx.array
    last_node: mx.array
    logits: mx.array
    error: Exception | None = None


def fetch(pairs: Sequence[tuple[Verdict, Drafts]]) -> list[list[int]]:
    """The one host sync: the last accepted node, tokens, draft ids and parents of each step."""
    ids = [
        mx.concatenate([v.last_node[None], v.tokens, d.tokens, *_tree_ids(d.tree)])
        for v, d in pairs
    ]
    probs = [drafts.tree.probs for _, drafts in pairs if drafts.tree is not None]
    mx.eval(ids, probs, [(drafts.candidates, drafts.probs) for _, drafts in pairs])
    return [cast(list[int], row.tolist()) for row in ids]


def _tree_ids(tree: DraftTree | None) -> list[mx.array]:
    return [] if tree is None else [tree.tokens, tree.parents]


def make_outcome(
    layout: StepLayout,
    verdict: Verdict,
    drafts: Drafts,
    fetched: list[int],
    hidden: mx.array,
    ms: float,
) -> Outcome:
    """Put a step's evaluated arrays into its outcome."""
    if verdict.error is not None:
        return Outcome(error=verdict.error)
    last_node, *ids = fetched
    tokens, ids = ids[: len(verdict.tokens)], ids[len(verdict.tokens) :]
    nodes, tree = [0, *layout.path(last_node)], drafts.tree
    drafts = replace(drafts, host_ids=ids[: len(drafts)])
    if tree is not None:
        drafts = replace(drafts, tree=tree.fetched(ids[len(drafts) :]))
    return Outcome(
        tokens=[tokens[node] for node in nodes],
        last_node=last_node,
        logits=_taken(verdict.logits, nodes),
        drafts=drafts,
        hidden=_taken(hidden, layout.rows_to(last_node)),
        ms=ms,
    )


def _taken(rows: mx.array, indices: list[int]) -> mx.array:
    """Some of the rows ``[n, ...]``; a slice if they are the first."""
    count = len(indices)
    return rows[:count] if indices[-1] == count - 1 else rows[mx.array(indices, mx.int32)]
