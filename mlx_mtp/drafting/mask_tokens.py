"""Drafts from mask tokens: hidden states of mask rows in, draft tokens out.

The base model's head ranks the whole vocabulary for each mask row in one matmul; the sampler head
then re-ranks only a shortlist of it, one draft after the other, each conditioned on the draft
before.  k full unembeddings in a row would cost half a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.drafting.drafter import Distribution, Drafter, Drafts
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import MASK

SHORTLIST = 64
_BLOCKS = 1024  # of a vocabulary; each is represented by its best token


class MaskTokenDrafter(Drafter):
    """Proposes what the mask rows of the last step predicted after its accepted prefix.

    Args:
        model: the model with its adapter.
        distribution: turns logits into the probabilities that drafts are drawn from, those of the
            answer, which makes min(target, draft) large; None drafts the most likely tokens.
    """

    source = MASK

    def __init__(self, model: MTPModel, distribution: Distribution | None) -> None:
        self._model = model
        self._distribution = distribution
        self._drafts = Drafts.none()

    @property
    def num_drafts(self) -> int:
        return len(self._drafts)

    def first(self, count: int) -> Drafts:
        """The first of the drafts made in the last step."""
        return self._drafts.first(count)

    def commit(self, layout: StepLayout, tokens: Sequence[int], drafts: Drafts) -> None:
        """Keep the new drafts, of which a step makes as many as its largest mask group has."""
        self._drafts = drafts.first(layout.mask_counts[len(tokens) - 1])

    def rows(self, layout: StepLayout, num_accepted: mx.array) -> mx.array | None:
        """The mask group after the accepted prefix."""
        if layout.num_masks == 0:
            return None
        return layout.group_rows[num_accepted] - (layout.num_pending - 1)

    def draft(
        self, hidden: mx.array, logits: mx.array, previous: mx.array, *, key: mx.array
    ) -> Drafts:
        """Draft one token per mask row."""
        return draft_tokens(
            self._model, hidden, logits, previous, distribution=self._distribution, key=key
        )


def draft_tokens(
    model: MTPModel,
    hidden: mx.array,
    logits: mx.array,
    previous: mx.array,
    *,
    distribution: Distribution | None = None,
    key: mx.array,
    shortlist: int = SHORTLIST,
) -> Drafts:
    """Draft one token per mask row.

    Args:
        model: the model with its adapter.
        hidden: final hidden states of a mask group, ``[m, D]``.
        logits: the base model's logits for them, ``[m, V]``.
        previous: the token before the first draft, scalar.
        distribution: turns logits ``[..., V]`` into the probabilities that drafts are drawn from;
            None drafts the most likely tokens.
        key: random key.
        shortlist: how many candidates the sampler head re-ranks.
    """
    candidates = shortlisted(logits, shortlist)
    if model.sampler_head is None:
        scores = mx.take_along_axis(logits, candidates, axis=-1)
        return _chain(candidates, lambda j, _: scores[j], previous, distribution, key)
    head = model.sampler_head
    unembed = model.unembed_rows(candidates)  # [m, S, D]

    def score(j: int, before: mx.array) -> mx.array:
        return unembed[j] @ head(model.embed(before), hidden[j])

    return _chain(candidates, score, previous, distribution, key)


def shortlisted(logits: mx.array, size: int) -> mx.array:
    """The likeliest tokens of each row, in no order.

    A partition of the whole vocabulary would take longer than the rest of drafting.  So a large
    one is cut into 1,024 blocks, token t into block t mod 1024, and the best tokens of the best
    blocks are taken: the likeliest always, another unless it shares a block with a likelier one.

    Args:
        logits: ``[m, V]``.
        size: how many.

    Returns:
        int32 ``[m, min(size, V)]``.
    """
    rows, vocab = logits.shape
    size = min(size, vocab)
    if vocab < 2 * _BLOCKS or size > _BLOCKS // 2:
        return mx.argpartition(-logits, kth=size - 1, axis=-1)[:, :size].astype(mx.int32)
    if vocab % _BLOCKS:
        fill = [(0, 0), (0, -vocab % _BLOCKS)]
        logits = mx.pad(logits, fill, constant_values=-float("inf"))
    blocks = logits.reshape(rows, -1, _BLOCKS)
    best = mx.argpartition(-blocks.max(axis=1), kth=size - 1, axis=-1)[:, :size]
    place = mx.take_along_axis(mx.argmax(blocks, axis=1), best, axis=-1)
    return (place * _BLOCKS + best).astype(mx.int32)


def _chain(candidates, score, previous, distribution: Distribution | None, key: mx.array) -> Drafts:
    """Pick draft after draft; ``score(j, token before)`` rates the candidates of row j."""
    tokens, probs = [], []
    for j, step_key in enumerate(mx.random.split(key, candidates.shape[0])):
        scores = score(j, previous)
        if distribution is None:
            pick = mx.argmax(scores)
        else:
            probs.append(distribution(scores[None])[0])
            pick = mx.random.categorical(mx.log(probs[-1]), key=step_key)
        previous = candidates[j, pick]
        tokens.append(previous)
    if distribution is None:
        return Drafts.certain(mx.stack(tokens))
    return Drafts(mx.stack(tokens), candidates, mx.stack(probs))
