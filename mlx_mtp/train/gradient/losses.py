"""The three terms of the training loss over mask rows (arXiv 2507.11851, section 3.4).

- base: cross-entropy of the base model's own head on the mask rows,
- sampler: cross-entropy of the sampler head, with the correct previous token,
- lcm: mean squared distance between a mask row's final hidden state and that of the ordinary row
  that predicts the same token (latent consistency).

Each is a mean over the mask rows of a forward; those of the cross-entropies may have weights, see
``row_weights``.  Independent heads have the first term only: the
cross-entropy of the base model's head on the states of their drafts (arXiv 2404.19737, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.backends.cpu import fast_math
from mlx_mtp.evaluation.forward import OrdinaryRows, draft_states, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.settings import EVEN, REACH, TEACHERS, LossWeights

SMALLEST = 1e-30  # a mean of probabilities that underflow


@dataclass(frozen=True)
class Targets:
    """Targets of the mask rows of a sequence.

    Attributes:
        tokens: the token of each row, ``[R]``.
        previous: the token before it, ``[R]``.
        twins: index of the ordinary row that predicts the same token, ``[R]``.
        probs: the base model's distribution ``[R, V]``, only for the teacher ``dist``.
    """

    tokens: mx.array
    previous: mx.array
    twins: mx.array
    probs: mx.array | None = None


def make_targets(
    model: MTPModel,
    ordinary: OrdinaryRows,
    ids: mx.array,
    rows: MaskRows,
    *,
    teacher: str,
) -> Targets:
    """Compute the targets of mask rows; each must have a token to predict.

    Args:
        model: for the base model's head.
        ordinary: the sequence's ordinary rows.
        ids: the sequence ``[L]``.
        rows: its mask blocks.
        teacher: ``sample`` takes the token of the text, ``argmax`` the most likely one of the
            base model, ``dist`` its whole distribution.

    Raises:
        ValueError: the teacher is unknown, or a row has no token to predict.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {teacher!r}")
    last = int(rows.row_positions.max())
    if last + 1 >= ids.size:  # MLX would read beyond the end of the array
        raise ValueError(f"the mask at position {last} has no token to predict: {ids.size} ids")
    tokens, probs = ids[rows.positions + 1], None
    if teacher != "sample":
        needed, where = np.unique(rows.row_positions, return_inverse=True)
        logits = _wide(model.logits(ordinary.hidden[mx.array(needed)][None])[0])
        tokens = mx.argmax(logits, axis=-1)[mx.array(where)]
        if teacher == "dist":
            probs = mx.stop_gradient(mx.softmax(logits, axis=-1)[mx.array(where)])
    return Targets(
        tokens=mx.stop_gradient(tokens),
        previous=ids[rows.positions],
        twins=rows.positions,
        probs=probs,
    )


def loss_terms(
    model: MTPModel,
    ordinary: OrdinaryRows,
    rows: MaskRows,
    targets: Targets,
    *,
    candidates: int = 0,
    weights: str = EVEN,
) -> dict[str, mx.array]:
    """Compute the terms of the loss.

    Args:
        model: with its adapter.
        ordinary: the sequence's ordinary rows.
        rows: mask blocks of it.
        targets: of the rows.
        candidates: number of tokens over which the cross-entropies are computed: the most likely
            ones of any row, and the targets.  0 uses the whole vocabulary.
        weights: ``even``, or ``reach`` for the weights of ``row_weights``.

    Returns:
        The terms by name, float32 scalars; ``sampler`` only with a sampler head, ``lcm`` only of
        mask rows.
    """
    hidden = draft_states(model, ordinary, rows)
    head = _head(model, hidden, targets, candidates)
    losses = {"base": _cross_entropy(head, hidden, targets)}
    if model.sampler_head is not None:
        state = model.sampler_head(model.embed(targets.previous), hidden)
        losses["sampler"] = _cross_entropy(head, state, targets)
    if weights == REACH:
        drafted = losses.get("sampler", losses["base"])
        factors = row_weights(drafted, rows)
        losses = {name: loss * factors[name] for name, loss in losses.items()}
    terms = {name: loss.mean() for name, loss in losses.items()}
    if model.heads is None:
        difference = _wide(hidden - ordinary.hidden[targets.twins])
        terms["lcm"] = mx.square(difference).mean()
    return terms


def row_weights(losses: mx.array, rows: MaskRows) -> dict[str, mx.array]:
    """Weights of mask rows by how much their drafts matter to a decode.

    With q_j = exp(-loss_j), the probability that mask j's draft is accepted if all before it are,
    and R_j = q_1 ... q_j that all up to it are, a block of k masks has these terms:

    - base: R_(j-1), the probability that a decode reaches the draft,
    - sampler: R_j + ... + R_k, the factor of mask j's loss in the gradient of E = R_1 + ... + R_k,
      the expected number of accepted drafts: dE / dlog q_j.

    A weight is half of 1 and half of its term, scaled to a mean of 1 over the forward.  Without the
    first half, rows that are hardly ever reached would not be learnt.

    Args:
        losses: cross-entropy of what makes the drafts, with the correct previous token, ``[R]``.
        rows: the blocks.

    Returns:
        Weights without gradient by term, ``[R]``; their mean is 1.
    """
    shape = (len(rows.anchors), int(rows.mask_offsets.max()) + 1)  # [G, k]; blocks may be short
    places = mx.array(rows.row_blocks), mx.array(rows.mask_offsets)
    empty = mx.zeros(shape, losses.dtype)
    log_q = empty.at[places].add(-mx.stop_gradient(losses))
    accepted = empty.at[places].add(mx.exp(mx.cumsum(log_q, axis=1))[places])
    parts = {
        "base": mx.exp(mx.cumsum(log_q, axis=1, inclusive=False)),
        "sampler": mx.cumsum(accepted, axis=1, reverse=True),
    }
    weights = {}
    for name, part in parts.items():
        term = part[places]
        weights[name] = 0.5 + 0.5 * term / mx.maximum(term.mean(), SMALLEST)
    return weights


def total_loss(terms: dict[str, mx.array], weights: LossWeights) -> mx.array:
    """The weighted sum of the terms."""
    return mx.stack([term * getattr(weights, name) for name, term in terms.items()]).sum()


@dataclass(frozen=True)
class _Head:
    """The base model's head over the whole vocabulary or over some tokens of it.

    Attributes:
        logits: hidden states ``[R, D]`` to logits ``[R, V]`` or ``[R, C]``.
        chosen: ids of the tokens, ascending ``[C]``; None for the whole vocabulary.
    """

    logits: Callable[[mx.array], mx.array]
    chosen: mx.array | None = None


def _head(model: MTPModel, hidden: mx.array, targets: Targets, candidates: int) -> _Head:
    def whole(hidden: mx.array) -> mx.array:
        return _wide(model.logits(hidden[None])[0])

    if not 0 < candidates < model.vocab_size:
        return _Head(whole)
    logits = mx.stop_gradient(whole(hidden))
    score = (logits - logits.max(axis=-1, keepdims=True)).max(axis=0)
    score = mx.put_along_axis(score, targets.tokens, mx.array(mx.inf), axis=0)
    size = max(candidates, min(targets.tokens.size, model.vocab_size))
    chosen = mx.sort(mx.argpartition(-score, kth=size - 1)[:size])
    weights = mx.stop_gradient(_wide(model.unembed_rows(chosen)))
    return _Head(lambda hidden: _wide(hidden) @ weights.T, chosen)


def is_plain_head(model: MTPModel) -> bool:
    """Whether the base model's head is only a product with the unembedding."""
    rows = mx.random.normal((2, model.hidden_size), key=mx.random.key(0)).astype(model.dtype)
    ids = mx.arange(min(64, model.vocab_size))
    whole = _wide(model.logits(rows[None])[0][:, : ids.size])
    product = _wide(rows @ model.unembed_rows(ids).T)
    difference = mx.abs(whole - product).max()
    return bool((difference <= 0.02 * mx.abs(product).max()).item())


def _cross_entropy(head: _Head, hidden: mx.array, targets: Targets) -> mx.array:
    """Cross-entropy of the base model's head over hidden states ``[R, D]``, of each row ``[R]``."""
    logits, tokens, probs = head.logits(hidden), targets.tokens, targets.probs
    if head.chosen is not None:
        tokens = (head.chosen[None] < tokens[:, None]).sum(axis=-1)  # index among the candidates
        if probs is not None:
            probs = probs[:, head.chosen]
            probs = probs / probs.sum(axis=-1, keepdims=True)
    if probs is not None:
        return _logsumexp(logits) - (probs * logits).sum(axis=-1)
    if _is_fast(logits):
        return fast_math.cross_entropy(logits, tokens)
    return nn.losses.cross_entropy(logits, tokens, reduction="none")


def _logsumexp(logits: mx.array) -> mx.array:
    return fast_math.logsumexp(logits) if _is_fast(logits) else mx.logsumexp(logits, axis=-1)


def _is_fast(x: mx.array) -> bool:
    return x.dtype == mx.float32 and mx.default_device().type == mx.cpu


def _wide(x: mx.array) -> mx.array:
    """Cast to at least float32, for sums over a vocabulary."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def next_token_loss(
    model: MTPModel, sequences: Sequence[TokenSequence], *, rows_per_piece: int = 128
) -> float:
    """Cross-entropy of the ordinary rows over the answers of sequences, in nats per token.

    With the gate it is that of the base model and constant.

    Raises:
        ValueError: the sequences have no answer.
    """
    total, count = 0.0, 0
    for sequence in sequences:
        ids = mx.array(sequence.ids)
        hidden = ordinary_rows(model, ids).hidden
        places = np.flatnonzero(sequence.answer[1:])  # rows whose next token is an answer's
        for start in range(0, len(places), rows_per_piece):
            rows = mx.array(places[start : start + rows_per_piece])
            logits = _wide(model.logits(hidden[rows][None])[0])
            chosen = mx.take_along_axis(logits, ids[rows + 1][:, None], axis=-1)[:, 0]
            total += float(np.array((_logsumexp(logits) - chosen).sum()))
        count += len(places)
    if count == 0:
        raise ValueError("there are no answers to evaluate on")
    return total / count
