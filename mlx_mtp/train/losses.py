"""The three terms of the training loss over mask rows (arXiv 2507.11851, section 3.4).

- base: cross-entropy of the base model's own head on the mask rows,
- sampler: cross-entropy of the sampler head, told the right previous token,
- lcm: mean squared distance between a mask row's final hidden state and that of the ordinary row
  that predicts the same token (latent consistency).

Each is a weighted mean over the rows that have a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.model import MTPModel
from mlx_mtp.train.forward import OrdinaryRows, mask_rows
from mlx_mtp.train.packing import MaskRows

TEACHERS = ("argmax", "sample", "dist")


@dataclass(frozen=True)
class Targets:
    """What the mask rows of a sequence should predict.

    Attributes:
        tokens: the token of each row, ``[R]``.
        previous: the token before it, ``[R]``.
        twins: index of the ordinary row that predicts the same token, ``[R]``.
        weights: weight of each row, 0 for rows without a target, float32 ``[R]``.
        probs: the base model's distribution ``[R, V]``, for the teacher ``dist`` alone.
    """

    tokens: mx.array
    previous: mx.array
    twins: mx.array
    weights: mx.array
    probs: mx.array | None = None


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts."""

    base: float = 1.0
    sampler: float = 1.0
    lcm: float = 1.0


def make_targets(
    model: MTPModel,
    ordinary: OrdinaryRows,
    ids: mx.array,
    rows: MaskRows,
    *,
    keep: mx.array,
    teacher: str,
) -> Targets:
    """Say what the mask rows should predict.

    Args:
        model: for the base model's head.
        ordinary: the sequence's ordinary rows.
        ids: the sequence ``[L]``.
        rows: its mask blocks.
        keep: weight of each row ``[R]``; 0 where there is no target.
        teacher: ``sample`` takes the token that stands in the text; ``argmax`` the one that the
            base model would choose there; ``dist`` its whole distribution.

    Raises:
        ValueError: the teacher is none of these.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {teacher!r}")
    last = ids.shape[0] - 1
    twins = mx.minimum(rows.positions, last)
    tokens = ids[mx.minimum(rows.positions + 1, last)]
    probs = None
    if teacher != "sample":
        logits = _wide(model.logits(ordinary.hidden[twins][None])[0])
        tokens = mx.argmax(logits, axis=-1)
        if teacher == "dist":
            probs = mx.stop_gradient(mx.softmax(logits, axis=-1))
    return Targets(
        tokens=mx.stop_gradient(tokens),
        previous=ids[twins],
        twins=twins,
        weights=keep,
        probs=probs,
    )


def loss_terms(
    model: MTPModel, ordinary: OrdinaryRows, rows: MaskRows, targets: Targets
) -> dict[str, mx.array]:
    """Return the terms by name, float32 scalars; ``sampler`` only where there is a sampler head."""
    hidden = mask_rows(model, ordinary, rows)
    terms = {"base": _cross_entropy(model, hidden, targets)}
    if model.sampler_head is not None:
        state = model.sampler_head(model.embed(targets.previous), hidden)
        terms["sampler"] = _cross_entropy(model, state, targets)
    apart = _wide(hidden - ordinary.hidden[targets.twins])
    terms["lcm"] = _mean(mx.square(apart).mean(axis=-1), targets.weights)
    return terms


def total_loss(terms: dict[str, mx.array], weights: LossWeights) -> mx.array:
    """Add the terms up."""
    return mx.stack([term * getattr(weights, name) for name, term in terms.items()]).sum()


def _cross_entropy(model: MTPModel, hidden: mx.array, targets: Targets) -> mx.array:
    """Cross-entropy of the base model's head over hidden states ``[R, D]``."""
    logits = _wide(model.logits(hidden[None])[0])
    if targets.probs is None:
        chosen = mx.take_along_axis(logits, targets.tokens[:, None], axis=-1)[:, 0]
    else:
        chosen = (targets.probs * logits).sum(axis=-1)
    return _mean(mx.logsumexp(logits, axis=-1) - chosen, targets.weights)


def _wide(x: mx.array) -> mx.array:
    """At least float32, in which sums over a vocabulary are taken."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def _mean(values: mx.array, weights: mx.array) -> mx.array:
    return (values * weights).sum() / mx.maximum(weights.sum(), 1e-9)
