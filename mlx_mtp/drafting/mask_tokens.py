"""Mask rows' hidden states in, draft tokens out.

The base model's head ranks the whole vocabulary for each mask row in one matmul; the sampler head
then re-ranks only a shortlist of it, one draft after the other, each conditioned on the draft
before.  k full unembeddings in a row would cost half a small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_mtp.decoding.sampling import Sampling, target_probs
from mlx_mtp.model.mtp_model import MTPModel

SHORTLIST = 64
_BLOCKS = 1024  # of a vocabulary; each is represented by its best token


@dataclass(frozen=True)
class Drafts:
    """Drafts that wait to be verified, on the device.

    Attributes:
        tokens: draft ids, int32 ``[m]``.
        candidates: ids that the draft distributions are over, ``[m, S]``.
        probs: the distributions that the drafts were drawn from, ``[m, S]``; one-hot when greedy.
        host_ids: ``tokens`` on the host, once a sync has brought them there.
    """

    tokens: mx.array
    candidates: mx.array
    probs: mx.array
    host_ids: list[int] | None = None

    @classmethod
    def none(cls) -> Drafts:
        """No drafts."""
        return cls(mx.zeros((0,), mx.int32), mx.zeros((0, 1), mx.int32), mx.zeros((0, 1)))

    @classmethod
    def certain(cls, tokens: mx.array) -> Drafts:
        """Drafts ``[m]`` that were not drawn but chosen: their distributions are one-hot."""
        return cls(tokens, tokens[:, None], mx.ones((tokens.size, 1)))

    def first(self, count: int) -> Drafts:
        """The first drafts."""
        if count >= len(self):
            return self
        host_ids = None if self.host_ids is None else self.host_ids[:count]
        return Drafts(self.tokens[:count], self.candidates[:count], self.probs[:count], host_ids)

    def ids(self) -> list[int]:
        """Draft ids on the host; a sync if they are not there yet."""
        if self.host_ids is not None:
            return self.host_ids
        return cast(list[int], self.tokens.tolist())

    def __len__(self) -> int:
        return self.tokens.size


def draft_tokens(
    model: MTPModel,
    hidden: mx.array,
    logits: mx.array,
    previous: mx.array,
    *,
    sampling: Sampling,
    key: mx.array,
    shortlist: int = SHORTLIST,
) -> Drafts:
    """Draft one token per mask row.

    Args:
        model: the model with its adapter.
        hidden: final hidden states of a mask group, ``[m, D]``.
        logits: what the base model's head makes of them, ``[m, V]``.
        previous: the token before the first draft, scalar.
        sampling: greedy drafts when greedy, else drafts are drawn at the same settings, which
            makes min(target, draft) large.
        key: random key.
        shortlist: how many candidates the sampler head re-ranks.
    """
    candidates = shortlisted(logits, shortlist)
    if model.sampler_head is None:
        scores = mx.take_along_axis(logits, candidates, axis=-1)
        return _chain(candidates, lambda j, _: scores[j], previous, sampling, key)
    head = model.sampler_head
    unembed = model.unembed_rows(candidates)  # [m, S, D]

    def score(j: int, before: mx.array) -> mx.array:
        return unembed[j] @ head(model.embed(before), hidden[j])

    return _chain(candidates, score, previous, sampling, key)


def shortlisted(logits: mx.array, size: int) -> mx.array:
    """The likeliest tokens of each row, in no order.

    A partition of the whole vocabulary would take longer than the rest of drafting.  So a large
    one is cut into 1,024 blocks, token t into block t mod 1024, and the best tokens of the best
    blocks are taken: the likeliest always, another unless it shares a block with a likelier one.

    Args:
        logits: ``[m, V]``.
        size: how many are wanted.

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


def _chain(candidates, score, previous, sampling: Sampling, key: mx.array) -> Drafts:
    """Pick draft after draft; ``score(j, token before)`` rates the candidates of row j."""
    tokens, probs = [], []
    for j, step_key in enumerate(mx.random.split(key, candidates.shape[0])):
        scores = score(j, previous)
        if sampling.greedy:
            pick = mx.argmax(scores)
        else:
            probs.append(target_probs(scores[None], sampling)[0])
            pick = mx.random.categorical(mx.log(probs[-1]), key=step_key)
        previous = candidates[j, pick]
        tokens.append(previous)
    if sampling.greedy:
        return Drafts.certain(mx.stack(tokens))
    return Drafts(mx.stack(tokens), candidates, mx.stack(probs))
