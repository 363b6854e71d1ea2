"""The likeliest tokens of a row of logits, and drafts drawn from them."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.drafting.drafter import Distribution, Drafts

SHORTLIST = 64
_BLOCKS = 1024  # of a vocabulary, at least; each is represented by its best token


def shortlisted(logits: mx.array, size: int) -> mx.array:
    """The likeliest tokens of each row, in no order.

    A partition of the whole vocabulary would take longer than the rest of drafting.  So a large
    one is cut into at least 1,024 blocks B, token t into block t mod B, and the best tokens of the
    best blocks are taken: the likeliest always, another unless it shares a block with a likelier
    one.

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
    height = vocab // _BLOCKS
    if vocab % height:
        fill = [(0, 0), (0, -vocab % height)]
        logits = mx.pad(logits, fill, constant_values=-float("inf"))
    blocks = logits.reshape(rows, height, -1)
    num_blocks = blocks.shape[-1]
    best = mx.argpartition(-blocks.max(axis=1), kth=size - 1, axis=-1)[:, :size]
    place = mx.take_along_axis(mx.argmax(blocks, axis=1), best, axis=-1)
    return (place * num_blocks + best).astype(mx.int32)


def draw(logits: mx.array, distribution: Distribution | None, *, key: mx.array) -> Drafts:
    """Draft one token for each row of logits, independently of the other rows.

    Args:
        logits: ``[m, V]``.
        distribution: turns logits into the probabilities that drafts are drawn from; None drafts
            the most likely tokens.
        key: random key.
    """
    if distribution is None:
        return Drafts.certain(mx.argmax(logits, axis=-1).astype(mx.int32))
    candidates = shortlisted(logits, SHORTLIST)
    probs = distribution(mx.take_along_axis(logits, candidates, axis=-1))
    picks = mx.random.categorical(mx.log(probs), key=key)[:, None]
    return Drafts(mx.take_along_axis(candidates, picks, axis=-1)[:, 0], candidates, probs)
