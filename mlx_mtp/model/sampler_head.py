"""SamplerHead: conditions a draft on the draft before it.

Two blocks of Linear, SiLU and a normalisation map ``[E(previous token); z]`` to a state that the
base model's own unembedding turns into logits, with z the mask row's final hidden state
(arXiv 2507.11851, section 3.3).  Trainers differ in the normalisation and in what is added to the
second block's output; ``SamplerKind`` says which.  The default, LayerNorm and ``z + ...``, is that
of PEFT pull request 3541.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.config import SamplerKind


class SamplerHead(nn.Module):
    """Two blocks of Linear, SiLU, norm over ``[E(previous); z]``."""

    def __init__(self, dims: int, kind: SamplerKind | None = None) -> None:
        super().__init__()
        kind = kind or SamplerKind()
        norm = nn.LayerNorm if kind.norm == "layer" else nn.RMSNorm
        self.linear_1 = nn.Linear(2 * dims, dims, bias=kind.bias)
        self.norm_1 = norm(dims, eps=kind.norm_eps)
        self.linear_2 = nn.Linear(dims, dims, bias=kind.bias)
        self.norm_2 = norm(dims, eps=kind.norm_eps)
        self._residual = kind.residual

    def __call__(self, previous: mx.array, hidden: mx.array) -> mx.array:
        """Map the previous token's embedding and a mask row's hidden state, ``[..., D]`` each."""
        inner = self.norm_1(nn.silu(self.linear_1(mx.concatenate([previous, hidden], axis=-1))))
        out = self.norm_2(nn.silu(self.linear_2(inner)))
        if self._residual == "none":
            return out
        return (hidden if self._residual == "hidden" else inner) + out
