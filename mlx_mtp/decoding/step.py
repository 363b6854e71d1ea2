"""One step of an answer: a forward and what follows from it, alone or together with other answers'.

``Decoder.step`` plans nothing and runs nothing; it makes a ``Step``, and ``run_steps`` runs one or
several: one forward, one pass of the head or two, and one host sync for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from mlx_mtp.decoding.accept import accept_greedy, accept_sampled
from mlx_mtp.decoding.batching import batch_forward
from mlx_mtp.decoding.sampling import LogitsProcessor, Sampling, process_logits, target_probs
from mlx_mtp.drafting.mask_tokens import Drafts, draft_tokens
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel

HEAD_ROWS = 12  # up to here one pass of the head over all rows costs less than two over some


@dataclass(frozen=True)
class Decoder:
    """A model, the caches of an answer and the way its tokens are drawn."""

    model: MTPModel
    cache: MTPCache
    sampling: Sampling
    processors: list[LogitsProcessor]

    def step(
        self,
        pending: list[int],
        drafts: Drafts,
        layout: StepLayout,
        *,
        context: list[int],
        key: mx.array,
    ) -> Step:
        """Make a step, which ``run_steps`` is to run.

        Args:
            pending: ids that are not in the cache yet.
            drafts: the drafts to verify, as many as the layout has.
            layout: the rows.
            context: all ids so far, pending ones included.
            key: random key.
        """
        accept_key, draft_key = mx.random.split(key)
        return Step(self, pending, drafts, layout, context, accept_key, draft_key)


@dataclass(eq=False)
class Step:
    """A step that runs, or has run.

    Attributes:
        tokens: emitted ids, accepted drafts then the bonus token; None until it has run.
        num_accepted: drafts that held.
        logits: processed logits of ``tokens``, ``[num_accepted + 1, V]``.
        following: the next drafts.
        ms: what it took; NaN where other answers' steps ran in the same forward.
        error: what a logits processor raised; then it has no tokens and the answer is at its end.

    The cache holds all rows then.
    """

    decoder: Decoder
    pending: list[int]
    drafts: Drafts
    layout: StepLayout
    context: list[int]
    accept_key: mx.array
    draft_key: mx.array
    tokens: list[int] | None = None
    num_accepted: int = 0
    logits: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))
    following: Drafts = field(default_factory=Drafts.none)
    ms: float = math.nan
    error: Exception | None = None
    judged: tuple[mx.array, mx.array] = field(init=False)  # tokens [num_verify], num_accepted

    @property
    def num_verify(self) -> int:
        """Rows that are verified: the last pending one and the drafts."""
        return self.layout.num_draft_tokens + 1

    def rows(self) -> list[int]:
        """Ids of the forward; those of mask rows count mask tokens from 0."""
        return [*self.pending, *self.drafts.ids(), *self.layout.mask_offsets.tolist()]

    def judge(self, head: mx.array) -> bool:
        """Judge the drafts by the logits of the verify rows ``[num_verify, V]``.

        Returns:
            Whether that went well; else ``error`` says what a logits processor raised.
        """
        try:
            self.judged = self._accept(head)
        except Exception as error:
            self.error = error
        return self.error is None

    def _accept(self, head: mx.array) -> tuple[mx.array, mx.array]:
        """Return tokens ``[num_verify]`` and num_accepted."""
        self.logits = process_logits(
            head,
            context=self.context,
            drafts=self.drafts.ids(),
            processors=self.decoder.processors,
        )
        sampling, drafts = self.decoder.sampling, self.drafts
        if sampling.greedy:
            return accept_greedy(self.logits, drafts.tokens)
        probs = target_probs(self.logits, sampling)
        return accept_sampled(
            probs, drafts.tokens, drafts.candidates, drafts.probs, key=self.accept_key
        )

    def group(self) -> mx.array:
        """Rows of the mask group behind the accepted run, counted from the first verify row."""
        _, num_accepted = self.judged
        return self.layout.group_rows[num_accepted] - (self.layout.num_pending - 1)

    def draft(self, hidden: mx.array, logits: mx.array) -> None:
        """Draft from that group's hidden states ``[m, D]`` and logits ``[m, V]``."""
        tokens, num_accepted = self.judged
        self.following = draft_tokens(
            self.decoder.model,
            hidden,
            logits,
            tokens[num_accepted],
            sampling=self.decoder.sampling,
            key=self.draft_key,
        )

    def take(self, fetched: list[int]) -> None:
        """Take num_accepted, tokens and draft ids, now on the host."""
        self.num_accepted, *ids = fetched
        self.tokens = ids[: self.num_accepted + 1]
        self.logits = self.logits[: self.num_accepted + 1]
        following = replace(self.following, host_ids=ids[self.num_verify :])
        self.following = following.first(self.layout.mask_counts[self.num_accepted])


def run_steps(steps: Sequence[Step]) -> None:
    """Run steps of one model: accept, and draft from the mask group behind each accepted run.

    What one answer's logits processors raise is its step's ``error`` and spares the others.

    Args:
        steps: one, or one each of several answers, for a model that ``packing.can_batch``.
    """
    began = time.perf_counter()
    model = steps[0].decoder.model
    hidden = _forward(model, steps)  # each [verify rows + mask rows, D]
    one_pass = sum(each.shape[0] for each in hidden) <= HEAD_ROWS
    verified = [rows[: step.num_verify] for step, rows in zip(steps, hidden, strict=True)]
    heads = _logits(model, hidden if one_pass else verified)
    judged = [at for at, step in enumerate(steps) if step.judge(heads[at][: step.num_verify])]
    drafting = [at for at in judged if steps[at].layout.num_masks]
    groups = [steps[at].group() for at in drafting]
    masks = [hidden[at][group] for at, group in zip(drafting, groups, strict=True)]
    if one_pass:
        mask_logits = [heads[at][group] for at, group in zip(drafting, groups, strict=True)]
    else:
        mask_logits = _logits(model, masks)
    for at, rows, logits in zip(drafting, masks, mask_logits, strict=True):
        steps[at].draft(rows, logits)
    _fetch([steps[at] for at in judged])
    if len(steps) == 1:
        steps[0].ms = (time.perf_counter() - began) * 1e3


def _forward(model: MTPModel, steps: Sequence[Step]) -> list[mx.array]:
    """Hidden states of each step from its first verify row on."""
    rows = [step.rows() for step in steps]
    if len(steps) == 1:
        step = steps[0]
        hidden = [model(mx.array(rows), cache=step.decoder.cache, layout=step.layout)[0]]
    else:
        caches = [step.decoder.cache for step in steps]
        hidden = batch_forward(model, rows, caches, [step.layout for step in steps])
    return [each[step.layout.num_pending - 1 :] for each, step in zip(hidden, steps, strict=True)]


def _logits(model: MTPModel, parts: Sequence[mx.array]) -> list[mx.array]:
    """Logits of several lots of rows ``[n, D]``, in one pass of the head."""
    if len(parts) < 2:
        return [model.logits(part[None])[0] for part in parts]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[0])
    head: Any = model.logits(mx.concatenate(list(parts))[None])[0]
    return list(mx.split(head, ends[1:-1]))


def _fetch(steps: Sequence[Step]) -> None:
    """The one host sync: num_accepted, tokens and draft ids of each step in one list."""
    fetched = [
        mx.concatenate([step.judged[1][None], step.judged[0], step.following.tokens])
        for step in steps
    ]
    mx.eval(fetched, [(step.following.candidates, step.following.probs) for step in steps])
    for step, ids in zip(steps, fetched, strict=True):
        step.take(cast(list[int], ids.tolist()))
