"""Drafts from mask tokens: hidden states of mask rows in, draft tokens out.

The base model's head ranks the draft vocabulary for each mask row in one matmul; the sampler head
then re-ranks only a shortlist of it, one draft after the other, each conditioned on the draft
before.  k full unembeddings in a row would cost half a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.drafting.drafter import CommittedStep, Distribution, Drafter, Drafts
from mlx_mtp.drafting.shortlist import SHORTLIST
from mlx_mtp.drafting.vocabulary import ConversationVocabulary, RowLogits
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import MASK


class MaskTokenDrafter(Drafter):
    """Proposes what the mask rows of the last step predicted after its accepted prefix.

    Args:
        model: the model with its adapter.
        distribution: turns logits into the probabilities that drafts are drawn from, those of the
            answer, which makes min(target, draft) large; None drafts the most likely tokens.
        ids: the conversation so far, whose tokens join the draft vocabulary.
    """

    source = MASK

    def __init__(
        self, model: MTPModel, distribution: Distribution | None, ids: Sequence[int] = ()
    ) -> None:
        self._model = model
        self._distribution = distribution
        self._drafts = Drafts.none()
        self._vocabulary: ConversationVocabulary | None = None
        if model.frequent is not None:
            self._vocabulary = ConversationVocabulary(model, model.frequent, ids)

    @property
    def waiting(self) -> Drafts:
        """The drafts made in the last step."""
        return self._drafts

    def offer(self, room: int) -> Offer:
        """The drafts made in the last step."""
        return Offer(MASK, len(self._drafts))

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """The first of the drafts made in the last step."""
        return self._drafts.first(count)

    def commit(self, step: CommittedStep) -> None:
        """Keep the new drafts, of which a step makes as many as its largest mask group has."""
        self._take_up(step.next_ids)
        self._drafts = step.drafts.first(step.layout.mask_counts[step.last_node])

    def rows(self, layout: StepLayout, last_node: mx.array) -> mx.array | None:
        """The mask group after the last accepted draft."""
        if layout.num_masks == 0:
            return None
        return layout.group_rows[last_node] - (layout.num_pending - 1)

    def draft(
        self, hidden: mx.array, logits: mx.array, previous: mx.array, *, key: mx.array
    ) -> Drafts:
        """Draft one token per mask row."""
        rows = self._rate(hidden, logits)
        return draft_tokens(
            self._model, hidden, rows, previous, distribution=self._distribution, key=key
        )

    def _rate(self, hidden: mx.array, logits: mx.array) -> RowLogits:
        """Logits of the draft vocabulary; ``hidden`` and ``logits`` are those of ``draft``."""
        if self._vocabulary is None:
            return RowLogits(logits)
        return self._vocabulary.rate(hidden, logits)

    def _take_up(self, ids: Sequence[int]) -> None:
        """Let tokens of the conversation join the draft vocabulary."""
        if self._vocabulary is not None:
            self._vocabulary.add(ids)


def draft_tokens(
    model: MTPModel,
    hidden: mx.array,
    rows: RowLogits,
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
        rows: the base model's logits for them.
        previous: the token before the first draft, scalar.
        distribution: turns logits ``[..., V]`` into the probabilities that drafts are drawn from;
            None drafts the most likely tokens.
        key: random key.
        shortlist: how many candidates the sampler head re-ranks.
    """
    candidates, scores = rows.shortlist(shortlist)
    if model.sampler_head is None:
        return _chain(candidates, lambda j, _: scores[j], previous, distribution, key)
    head = model.sampler_head
    unembed = model.unembed_rows(candidates)  # [m, S, D]

    def score(j: int, before: mx.array) -> mx.array:
        return unembed[j] @ head(model.embed(before), hidden[j])

    return _chain(candidates, score, previous, distribution, key)


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
