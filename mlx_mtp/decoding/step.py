"""One step of an answer, alone or batched with steps of other answers: one forward, one sync."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.batching import forward, has_one_pass, head
from mlx_mtp.decoding.outcome import Outcome, Submitted, Verdict, evaluate
from mlx_mtp.drafting.drafter import Drafter, Drafts
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.noise import mask_ids


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
        token: the one pending id ``[1]``, on the device, where ``context`` lacks it because it has
            not been read yet; the step is plain then.
        row_ms: time of a forward by its rows, ``[R + 1]``, which decides about passes of the head;
            None has one for the verify rows and one for the rows that are drafted from.
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
    token: mx.array | None = None
    row_ms: np.ndarray | None = None

    def ids(self, config: MTPConfig | None) -> mx.array:
        """Ids of the rows ``[rows]``; see ``mask_ids`` for those of mask rows."""
        if self.token is not None:
            return self.token
        pending, layout = self.context[-self.layout.num_pending :], self.layout
        positions = self.cache.offset + layout.mask_positions
        masks = mask_ids(config, layout.mask_offsets, positions, seed=self.seed).tolist()
        if self.drafts.host_ids is not None:
            return mx.array([*pending, *self.drafts.host_ids, *masks], mx.int32)
        parts = [mx.array(pending, mx.int32), self.drafts.tokens, mx.array(masks, mx.int32)]
        return mx.concatenate(parts)


def run(model: MTPModel, steps: Sequence[Step]) -> list[Outcome]:
    """Run steps of one model: one forward, one or two passes of the head and one host sync.

    An exception of one answer's logits processors or sampler is its outcome's ``error`` and does
    not concern the others.

    Args:
        model: the model.
        steps: one step, or one per answer if ``can_batch(model)``; no prompt chunk in a batch.
    """
    return submit(model, steps).outcomes()


def submit(model: MTPModel, steps: Sequence[Step]) -> Submitted:
    """Let the device begin with steps, which ``run`` also waits for."""
    began = time.perf_counter()
    ids, layouts = [step.ids(model.config) for step in steps], [step.layout for step in steps]
    rows = forward(model, ids, [step.cache for step in steps], layouts)
    if steps[0].is_prompt_chunk:
        mx.async_eval(steps[0].cache.state)
        return Submitted(layouts, [], [], rows, steps[0].cache.state, began)
    # From here on a step's rows begin with its first verify row: [d + 1 + masks, D].
    hidden = [rows[i][layout.num_pending - 1 :] for i, layout in enumerate(layouts)]
    verify = [hidden[i][: layout.num_draft_tokens + 1] for i, layout in enumerate(layouts)]
    one_pass = has_one_pass(model, layouts, [step.row_ms for step in steps])
    logits = head(model, hidden if one_pass else verify)
    verdicts = [_verify(step, logits[i][: len(verify[i])]) for i, step in enumerate(steps)]
    drafts = _draft(model, steps, verdicts, hidden, logits if one_pass else None)
    return Submitted(layouts, verdicts, drafts, rows, evaluate(verdicts, drafts), began)


def _verify(step: Step, logits: mx.array) -> Verdict:
    """Accept drafts by the logits of the verify rows ``[d+1, V]``."""
    target, drafts, parents = step.target, step.drafts, step.layout.parents
    try:
        logits = target.process(logits, context=step.context, drafts=drafts, parents=parents)
        accepted = target.accept(logits, drafts, key=step.keys[0], parents=parents)
        return Verdict(*accepted, logits)
    except Exception as error:  # the outcome has no tokens; placeholders keep the shapes
        return Verdict(mx.zeros(len(logits), mx.int32), mx.array(0), logits, error)


def _draft(
    model: MTPModel,
    steps: Sequence[Step],
    verdicts: Sequence[Verdict],
    hidden: Sequence[mx.array],
    logits: Sequence[mx.array] | None,
) -> list[Drafts]:
    """Propose the next drafts; ``logits`` of all rows where there was one pass of the head."""
    drafts = [Drafts.none()] * len(steps)
    needed = [s.drafter.rows(s.layout, verdicts[i].last_node) for i, s in enumerate(steps)]
    rows = {i: indices for i, indices in enumerate(needed) if indices is not None}
    states = [hidden[i][indices] for i, indices in rows.items()]
    heads = [logits[i][rows[i]] for i in rows] if logits else head(model.frequent or model, states)
    for i, state, mask_logits in zip(rows, states, heads, strict=True):
        step, bonus = steps[i], verdicts[i].tokens[verdicts[i].last_node]
        drafts[i] = step.drafter.draft(state, mask_logits, bonus, key=step.keys[1])
    return drafts
