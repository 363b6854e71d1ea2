"""The terms of ``losses`` in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_mtp.backends.pytorch.rows import OrdinaryRows, TorchRows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.config import SamplerKind
from mlx_mtp.train.gradient.losses import SMALLEST
from mlx_mtp.train.settings import REACH


@dataclass(frozen=True)
class Targets:
    """Targets of mask rows; see ``losses.Targets``."""

    tokens: Tensor
    previous: Tensor
    twins: Tensor
    probs: Tensor | None


@torch.no_grad()
def make_targets(
    model: TorchRows, ordinary: OrdinaryRows, ids: Tensor, rows: MaskRows, *, teacher: str
) -> Targets:
    """Compute the targets of mask rows; see ``losses.make_targets``."""
    places = torch.from_numpy(rows.row_positions.astype(np.int64)).to(model.device)
    tokens, probs = ids[places + 1], None
    if teacher != "sample":
        needed, where = torch.unique(places, return_inverse=True)
        logits = model.logits(ordinary.hidden[needed])
        tokens = logits.argmax(dim=-1)[where]
        if teacher == "dist":
            probs = logits.float().softmax(dim=-1)[where]
    return Targets(tokens, ids[places], places, probs)


def loss_terms(
    model: TorchRows,
    ordinary: OrdinaryRows,
    rows: MaskRows,
    hidden: Tensor,
    targets: Targets,
    *,
    candidates: int,
    weights: str,
    sampler: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Compute the terms of the loss; see ``losses.loss_terms``.

    Args:
        model: for its head and embeddings.
        ordinary: the sequence's ordinary rows.
        rows: mask blocks of it.
        hidden: final hidden states of these rows ``[R, D]``.
        targets: of the rows.
        candidates: number of tokens over which the cross-entropies are computed; 0 is all.
        weights: ``even``, or ``reach`` for the weights of ``row_weights``.
        sampler: the sampler head; None without one.

    Returns:
        The terms by name, float32 scalars.
    """
    head = _head(model, hidden, targets, candidates)
    losses = {"base": _cross_entropy(head, hidden, targets)}
    if sampler is not None:
        state = sampler(model.embed(targets.previous), hidden)
        losses["sampler"] = _cross_entropy(head, state, targets)
    if weights == REACH:
        factors = row_weights(losses.get("sampler", losses["base"]).detach(), rows)
        losses = {name: loss * factors[name] for name, loss in losses.items()}
    terms = {name: loss.mean() for name, loss in losses.items()}
    difference = hidden.float() - ordinary.hidden[targets.twins].float()
    terms["lcm"] = difference.square().mean()
    return terms


def row_weights(losses: Tensor, rows: MaskRows) -> dict[str, Tensor]:
    """Weights of mask rows by term; see ``losses.row_weights``."""
    places = torch.from_numpy(rows.row_blocks), torch.from_numpy(rows.mask_offsets.astype(np.int64))
    places = tuple(place.to(losses.device) for place in places)
    empty = losses.new_zeros(len(rows.anchors), int(rows.mask_offsets.max()) + 1)
    log_q = empty.index_put(places, -losses)
    accepted = empty.index_put(places, log_q.cumsum(1).exp()[places])
    parts = {
        "base": (log_q.cumsum(1) - log_q).exp(),
        "sampler": accepted.flip(1).cumsum(1).flip(1),
    }
    terms = {name: part[places] for name, part in parts.items()}
    return {name: 0.5 + 0.5 * x / x.mean().clamp_min(SMALLEST) for name, x in terms.items()}


@dataclass(frozen=True)
class _Head:
    """The head over the vocabulary or over some ids of it, ascending ``[C]``."""

    logits: Callable[[Tensor], Tensor]
    chosen: Tensor | None = None


def _head(model: TorchRows, hidden: Tensor, targets: Targets, candidates: int) -> _Head:
    if not 0 < candidates < len(model.unembedding):
        return _Head(lambda state: model.logits(state.to(model.dtype)).float())
    with torch.no_grad():
        logits = F.linear(hidden, model.unembedding)
        score = logits.sub_(logits.amax(dim=-1, keepdim=True)).amax(dim=0).float()
        score[targets.tokens] = torch.inf
        size = max(candidates, min(len(targets.tokens), len(score)))
        chosen = score.topk(size, sorted=False).indices.sort().values
    weight = model.unembedding[chosen]
    return _Head(lambda state: F.linear(state.to(weight.dtype), weight).float(), chosen)


def _cross_entropy(head: _Head, hidden: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy of each row ``[R]``."""
    logits, tokens, probs = head.logits(hidden), targets.tokens, targets.probs
    if head.chosen is not None:
        tokens = torch.searchsorted(head.chosen, tokens)
        if probs is not None:
            probs = probs[:, head.chosen]
            probs = probs / probs.sum(dim=-1, keepdim=True)
    if probs is None:
        return F.cross_entropy(logits, tokens, reduction="none")
    return logits.logsumexp(dim=-1) - (probs * logits).sum(dim=-1)


def sampler_head(
    weights: Mapping[str, Tensor], kind: SamplerKind, *, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """The sampler head (``model.sampler_head``), whose products have another type than its norms.

    Args:
        weights: by name, float32.
        kind: what it computes.
        dtype: of the products.
    """

    def block(number: int, x: Tensor) -> Tensor:
        bias, linear = weights.get(f"linear_{number}.bias"), weights[f"linear_{number}.weight"]
        y = F.linear(x.to(dtype), linear.to(dtype), None if bias is None else bias.to(dtype))
        y, weight = F.silu(y.float()), weights[f"norm_{number}.weight"]
        if kind.norm == "rms":
            return F.rms_norm(y, weight.shape, weight, kind.norm_eps)
        bias = weights.get(f"norm_{number}.bias")
        return F.layer_norm(y, weight.shape, weight, bias, kind.norm_eps)

    def head(previous: Tensor, hidden: Tensor) -> Tensor:
        """Map embeddings and final hidden states, ``[R, D]`` each, to states."""
        inner = block(1, torch.cat([previous, hidden], dim=-1))
        out = block(2, inner)
        if kind.residual == "none":
            return out
        return (hidden.float() if kind.residual == "hidden" else inner) + out

    return head
