"""Drafts from a draft model: a smaller model with the same tokenizer continues the text.

Speculative decoding as in Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318).
The draft model has a cache of its own, with a row for each id of the text and, in a step, for each
draft but the last.  After the step the rows of rejected drafts are dropped.  Recurrent layers
return to their state before the first draft instead; the accepted drafts are then read again, in
one forward with the ids after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.drafting.drafter import CommittedStep, Distribution, Drafter, Drafts
from mlx_mtp.drafting.shortlist import draw
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import DRAFT_MODEL

MAX_DRAFTS = 8  # of a step; the planner takes fewer where that is faster
_UNKNOWN = -1  # in place of an id that is in the cache only
_MANY_ROWS = 32  # rows that are evaluated before drafting begins: a prompt, or what others drafted


@dataclass(eq=False)
class DraftText:
    """A text that a draft model reads, which the next answer may continue.

    Attributes:
        draft: the draft model.
        cache: its cache, with the first ids of the text; in a step also with drafts after all ids.
        ids: the text.
        num_prompt: number of ids at the beginning of the answer.
    """

    draft: MTPModel
    cache: MTPCache
    ids: list[int]

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @classmethod
    def of_caches(cls, draft: MTPModel, caches: Sequence[Any]) -> DraftText:
        """A text of which only a list of mlx-lm's caches is known.

        Raises:
            ValueError: they are not those of the draft model.
        """
        cache = draft.wrap_prompt_cache(caches)
        return cls(draft, cache, [_UNKNOWN] * cache.offset)

    def read(self, end: int, *, step_size: int = 2048) -> mx.array | None:
        """Read the text up to ``end``.

        Returns:
            The hidden state of the last id that was read, ``[1, 1, D]``; None if there is none.
        """
        cache, last_token, hidden = self.cache, self.draft.vocab_size - 1, None
        are_many = end - cache.offset > _MANY_ROWS
        while (num_left := end - cache.offset) > 0:
            cache.begin_step(num_left if are_many else 0)
            rest = cache.rest_after_chunk(num_left, step_size) if are_many else 0
            ids = self.ids[cache.offset : end - rest]
            # The draft model may lack some of the model's tokens; others are read in their place.
            known = [min(max(token, 0), last_token) for token in ids]
            hidden = self.draft(mx.array([known]), cache=cache)
            if are_many:
                mx.eval(cache.state)
        return None if hidden is None else hidden[:, -1:]

    def end_at(self, end: int) -> None:
        """Leave the cache with the first ids of the text and nothing else.

        Args:
            end: their number; more than are known means all that are.
        """
        end = min(end, len(self.ids))
        self.cache.rewind(self.cache.offset - self.cache.rewind_point(end))
        self.read(end)

    def to_mlx_lm(self, caches: Sequence[Any]) -> list[Any]:
        """The draft model's cache as mlx-lm's.

        Args:
            caches: those that it came from, which are updated.
        """
        self.cache.begin_step()
        layers = zip(self.cache.layers, caches, strict=True)
        found = [layer.to_mlx_lm(into) for layer, into in layers]
        mx.eval(self.cache.state)
        return found


class DraftModelDrafter(Drafter):
    """Proposes what a draft model generates.

    Args:
        draft: the draft model; its tokenizer is the model's.
        model: the model that verifies the drafts.
        ids: the text: the ids known to the answer, prompt included.
        distribution: turns logits into the probabilities that drafts are drawn from, those of the
            answer; None drafts the most likely tokens.
        memory: the answer's ``MTPCache.drafter_memory``.
        num_before: cached ids before these, which only ``memory`` may know.
        max_drafts: maximum number of drafts per step; None leaves it to the drafter.
        prefill_step_size: rows of a prompt per forward.
    """

    source = DRAFT_MODEL

    def __init__(
        self,
        draft: MTPModel,
        model: MTPModel,
        ids: Sequence[int],
        distribution: Distribution | None,
        *,
        memory: dict[str, Any],
        num_before: int = 0,
        max_drafts: int | None = None,
        prefill_step_size: int = 2048,
    ) -> None:
        self._draft = draft
        self._cost = num_bytes(draft.base) / num_bytes(model.base)
        self._num_tokens = min(draft.vocab_size, model.vocab_size)  # tables may be padded
        self._distribution = distribution
        self._max_drafts = max_drafts or MAX_DRAFTS
        self._prefill_step_size = prefill_step_size
        text = _continued(memory.get(DRAFT_MODEL), draft, ids, num_before)
        self._text = memory[DRAFT_MODEL] = text
        self._last: mx.array | None = None  # hidden state of the text's last id, once it is read
        self._start = text.cache.offset  # rows before the drafts
        self._checkpoints: list[Any] = []  # of recurrent layers, without that at ``_start``

    def offer(self, room: int) -> Offer:
        """As many drafts as fit; each of them takes a forward of the draft model."""
        count, limit = min(self._max_drafts, room), self._draft.max_context
        if limit is not None:
            count = min(count, limit - len(self._text.ids))
        return Offer(self.source, max(count, 0), first_cost=self._cost, next_cost=self._cost)

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """Generate drafts, each from the one before."""
        text, drafts = self._text, list[Drafts]()
        self._keep(len(text.ids))  # the step that was planned before may not have been run
        if text.cache.offset < len(text.ids):
            self._last = text.read(len(text.ids), step_size=self._prefill_step_size)
        hidden = self._last
        assert hidden is not None
        self._mark()
        for step_key in mx.random.split(key, count):
            if drafts:
                hidden = self._draft(drafts[-1].tokens[None], cache=text.cache)
            logits = self._draft.logits(hidden)[0, :, : self._num_tokens]
            drafts.append(draw(logits, self._distribution, key=step_key))
        return Drafts.joined(drafts)

    def commit(self, step: CommittedStep) -> None:
        """Keep the rows of accepted drafts; read of a prompt as much as the model has read."""
        text, num_ids, num_pending = self._text, len(self._text.ids), step.layout.num_pending
        if step.tokens:
            text.ids += step.next_ids[num_pending - 1 :]
        self._keep(len(text.ids) - 1 if step.source == self.source else num_ids)
        if num_pending > 1:
            limit = self._draft.max_context or len(text.ids)
            end = min(text.cache.offset + num_pending, len(text.ids) - 1, limit)
            text.read(end, step_size=self._prefill_step_size)

    def _mark(self) -> None:
        """Make it possible to drop the rows that follow."""
        cache = self._text.cache
        self._start = cache.offset
        self._checkpoints = [layer.checkpoints for layer in cache.recurrent_layers]
        cache.checkpoint()

    def _keep(self, count: int) -> None:
        """Drop rows until at most ``count`` are left; of recurrent layers drop all drafts."""
        cache = self._text.cache
        layers = cache.recurrent_layers
        if cache.offset > count:
            cache.rewind(cache.offset - (self._start if layers else count))
        # The one at the drafts would soon replace those near the end of the prompt.
        for layer, checkpoints in zip(layers, self._checkpoints, strict=False):
            layer.checkpoints = checkpoints
        self._checkpoints = []


def num_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    arrays: Any = tree_flatten(model.parameters())
    return sum(value.nbytes for _, value in arrays)


def _continued(
    known: DraftText | None, draft: MTPModel, ids: Sequence[int], num_before: int
) -> DraftText:
    """A text as far as the draft model has read it for an earlier answer."""
    cache, text = None, list(ids)
    if known is not None and known.draft.base is draft.base:
        text = [*known.ids[:num_before], *ids]
        pairs = zip(known.ids, text, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_rows = known.cache.rewind_point(min(num_shared, len(text) - 1))
        if num_rows or known.cache.offset == 0:
            cache = known.cache
            cache.rewind(cache.offset - num_rows)
    cache = draft.make_cache() if cache is None else cache
    cache.keeps_checkpoints = True
    return DraftText(draft, cache, text)
