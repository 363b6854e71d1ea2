"""A beam of draft tokens from one mask group: the likeliest continuations, as a tree.

A chain takes the best candidate of every mask row.  The beam takes at each depth the ``width``
pairs of a node of the depth before and a candidate that have the highest probability together, as
far as the sampler head knows (arXiv 2507.11851, section 3.3).  The mask rows do not depend on the
drafts, so a depth is two small matrix products however wide the beam is.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.model.mtp_model import MTPModel


class Beam(NamedTuple):
    """Nodes of a tree, depth by depth and in a depth from the likeliest down.

    Attributes:
        tokens: int32 ``[N]``.
        parents: what each node follows: 0 the token before the drafts, j the j-th node, counted
            from 1; int32 ``[N]``.
        probs: probability of the node's token if its parent is right, ``[N]``.
    """

    tokens: mx.array
    parents: mx.array
    probs: mx.array


def draft_beam(
    model: MTPModel,
    hidden: mx.array,
    base_scores: mx.array,
    candidates: mx.array,
    previous: mx.array,
    *,
    width: int,
) -> Beam:
    """Draft a tree, on the device and without a sync.

    Args:
        model: the model with its adapter.
        hidden: final hidden states of a mask group, ``[m, D]``.
        base_scores: the base model's logits of the candidates, ``[m, S]``; used without a sampler
            head only.
        candidates: the candidates of each mask row, ``[m, S]``.
        previous: the token before the first draft, scalar.
        width: nodes of each depth, as far as there are candidates.
    """
    head, (num_depths, size) = model.sampler_head, candidates.shape
    table = base_scores[:, None]  # the same scores after any token, [m, 1, S]
    if head is not None:  # rows of the unembedding, [m, D, S]
        table = model.unembed_rows(candidates).swapaxes(1, 2)
    before, first = previous[None], 0  # tokens of the depth before [B], and its first node
    reached = mx.zeros((1,))  # log-probability of each of its nodes [B]
    tokens, parents, logprobs = [], [], []
    for depth in range(num_depths):
        if head is None:
            scores = mx.broadcast_to(table[depth], (before.size, size))
        else:
            rows = mx.broadcast_to(hidden[depth], (before.size, hidden.shape[-1]))
            scores = head(model.embed(before), rows) @ table[depth]  # [B, S]
        scores = scores.astype(mx.float32)
        scores = (scores - mx.logsumexp(scores, axis=-1, keepdims=True)).reshape(-1)
        joint = mx.repeat(reached, size) + scores  # [B S]
        best = mx.argsort(-joint)[:width].astype(mx.int32)
        parents.append(first + best // size)
        first += before.size
        before, reached = candidates[depth][best % size], joint[best]
        tokens.append(before)
        logprobs.append(scores[best])
    probs = mx.exp(mx.concatenate(logprobs))
    return Beam(mx.concatenate(tokens), mx.concatenate(parents), probs)
