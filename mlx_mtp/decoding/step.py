"""One step of an answer, alone or in a batch with other answers': one forward and one host sync."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.batching import batch_forward
from mlx_mtp.drafting.drafter import Drafter, Drafts
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel

HEAD_ROWS = 12  # up to here one pass of the head over all rows costs less than two over some


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """The input of a step.

    Attributes:
        cache: caches of the answer, to which ``run`` appends all rows.
        layout: the rows.
        pending: ids that are not in the cache yet.
        drafts: drafts to verify, as many as the layout has.
        context: all ids so far, pending ones included.
        target: what the emitted ids follow; None emits nothing: a chunk of the prompt.
        drafter: proposes the next drafts within the step.
        key: random key.
    """

    cache: MTPCache
    layout: StepLayout
    pending: list[int]
    drafts: Drafts = field(default_factory=Drafts.none)
    context: list[int] = field(default_factory=list)
    target: Target | None = None
    drafter: Drafter | None = None
    key: mx.array | None = None

    @property
    def is_prompt_chunk(self) -> bool:
        """Whether its rows only go into the cache."""
        return self.target is None

    @property
    def ids(self) -> list[int]:
        """Ids of the rows; those of mask rows count mask tokens from 0."""
        return [*self.pending, *self.drafts.ids(), *self.layout.mask_offsets.tolist()]


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """The output of a step, all of it computed; the cache has all rows then.

    Attributes:
        tokens: accepted drafts, then the bonus token; none of a prompt chunk.
        num_accepted: accepted drafts.
        logits: processed logits of ``tokens``, ``[num_accepted + 1, V]``.
        drafts: what the drafter proposed.
        ms: duration; NaN in a batch.
        error: what a logits processor or sampler raised; the answer cannot continue then.
    """

    tokens: list[int] = field(default_factory=list)
    num_accepted: int = 0
    logits: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))
    drafts: Drafts = field(default_factory=Drafts.none)
    ms: float = math.nan
    error: Exception | None = None


class _Verdict(NamedTuple):
    """What was accepted, on the device: tokens ``[d+1]``, num_accepted, logits ``[d+1, V]``."""

    tokens: mx.array
    num_accepted: mx.array
    logits: mx.array


def run(model: MTPModel, steps: Sequence[Step]) -> list[Outcome]:
    """Run steps of one model: one forward, one or two passes of the head and one host sync.

    An exception of one answer's logits processors or sampler is its outcome's ``error`` and does
    not concern the others.

    Args:
        model: the model.
        steps: one, or one each of several answers if ``can_batch(model)``, no prompt chunk then.
    """
    began = time.perf_counter()
    hidden = _forward(model, steps)  # per step, from its first verify row on: [d + 1 + masks, D]
    if steps[0].is_prompt_chunk:
        mx.eval(steps[0].cache.state)
        return [Outcome()]
    verify = [slice(step.layout.num_draft_tokens + 1) for step in steps]
    one_pass = sum(rows.shape[0] for rows in hidden) <= HEAD_ROWS
    parts = hidden if one_pass else [rows[v] for rows, v in zip(hidden, verify, strict=True)]
    logits = _logits(model, parts)
    outcomes, verdicts = {}, {}
    for i, step in enumerate(steps):
        try:
            verdicts[i] = _verify(step, logits[i][verify[i]])
        except Exception as error:
            outcomes[i] = Outcome(error=error)
    drafts = _draft(model, steps, verdicts, hidden, logits if one_pass else None)
    fetched = _fetch([(verdicts[i], drafts[i]) for i in verdicts])
    ms = (time.perf_counter() - began) * 1e3 if len(steps) == 1 else math.nan
    for (i, verdict), (num_accepted, *ids) in zip(verdicts.items(), fetched, strict=True):
        outcomes[i] = Outcome(
            tokens=ids[: num_accepted + 1],
            num_accepted=num_accepted,
            logits=verdict.logits[: num_accepted + 1],
            drafts=replace(drafts[i], host_ids=ids[verdict.tokens.size :]),
            ms=ms,
        )
    return [outcomes[i] for i in range(len(steps))]


def _forward(model: MTPModel, steps: Sequence[Step]) -> list[mx.array]:
    if len(steps) == 1:
        [step] = steps
        hidden = [model(mx.array([step.ids]), cache=step.cache, layout=step.layout)[0]]
    else:
        ids, caches = [step.ids for step in steps], [step.cache for step in steps]
        hidden = batch_forward(model, ids, caches, [step.layout for step in steps])
    return [rows[step.layout.num_pending - 1 :] for rows, step in zip(hidden, steps, strict=True)]


def _logits(model: MTPModel, parts: Sequence[mx.array]) -> list[mx.array]:
    """Logits of several arrays of rows ``[n, D]``, in one pass of the head."""
    if len(parts) < 2:
        return [model.logits(part[None])[0] for part in parts]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[0])
    logits: Any = model.logits(mx.concatenate(list(parts))[None])[0]
    return list(mx.split(logits, ends[1:-1]))


def _verify(step: Step, logits: mx.array) -> _Verdict:
    """Accept drafts by the logits of the verify rows ``[d+1, V]``."""
    assert step.target is not None and step.key is not None
    logits = step.target.process(logits, context=step.context, drafts=step.drafts)
    accept_key, _ = mx.random.split(step.key)
    return _Verdict(*step.target.accept(logits, step.drafts, key=accept_key), logits)


def _draft(
    model: MTPModel,
    steps: Sequence[Step],
    verdicts: dict[int, _Verdict],
    hidden: Sequence[mx.array],
    logits: Sequence[mx.array] | None,
) -> dict[int, Drafts]:
    """Propose the next drafts; ``logits`` of all rows where there was one pass of the head."""
    drafts, rows = {}, {}
    for i, verdict in verdicts.items():
        drafter, layout = steps[i].drafter, steps[i].layout
        chosen = drafter.rows(layout, verdict.num_accepted) if drafter is not None else None
        if chosen is None:
            drafts[i] = Drafts.none()
        else:
            rows[i] = chosen - (layout.num_pending - 1)
    states = [hidden[i][chosen] for i, chosen in rows.items()]
    heads = [logits[i][rows[i]] for i in rows] if logits else _logits(model, states)
    for i, state, head in zip(rows, states, heads, strict=True):
        _, key = mx.random.split(steps[i].key)
        bonus_token = verdicts[i].tokens[verdicts[i].num_accepted]
        drafts[i] = cast(Drafter, steps[i].drafter).draft(state, head, bonus_token, key=key)
    return drafts


def _fetch(results: Sequence[tuple[_Verdict, Drafts]]) -> list[list[int]]:
    """The one host sync: num_accepted, tokens and draft ids of each step."""
    ids = [
        mx.concatenate([verdict.num_accepted[None], verdict.tokens, drafts.tokens])
        for verdict, drafts in results
    ]
    mx.eval(ids, [(drafts.candidates, drafts.probs) for _, drafts in results])
    return [cast(list[int], row.tolist()) for row in ids]
