"""SamplerHead: makes a draft follow the draft before it.

``out = z + MLP([E(previous token); z])`` with z the mask row's final hidden state
(arXiv 2507.11851, section 3.3; the residual is that of PEFT pull request 3541).  The MLP is two
blocks of Linear, SiLU, LayerNorm.  The base model's own unembedding turns ``out`` into logits.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class SamplerHead(nn.Module):
    """Two blocks of Linear, SiLU, LayerNorm over ``[E(previous); z]``, with a residual on z."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * dims, dims)
        self.norm_1 = nn.LayerNorm(dims)
        self.linear_2 = nn.Linear(dims, dims)
        self.norm_2 = nn.LayerNorm(dims)

    def __call__(self, previous: mx.array, hidden: mx.array) -> mx.array:
        """Map the previous token's embedding and a mask row's hidden state, ``[..., D]`` each."""
        x = self.norm_1(nn.silu(self.linear_1(mx.concatenate([previous, hidden], axis=-1))))
        return hidden + self.norm_2(nn.silu(self.linear_2(x)))
