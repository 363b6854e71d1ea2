"""DraftHeads: independent heads on the final hidden states of a frozen model.

The model's own head turns the state of a row into the next token.  Of n more heads, head j turns
the same state into one whose token follows j + 1 positions later, and the model's own head gives
the logits of all.  Two kinds:

- ``mlp``: ``h + silu(W h + b)``, one row at a time (Medusa, arXiv 2401.10774, section 3.1);
- ``layer``: a decoder layer of llama's kind, which attends over the states of all rows so far with
  keys and values of its own (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

The heads do not see each other's tokens.  New ones leave the state unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.config import MLP, HeadsConfig
from mlx_mtp.model.layout import StepScope

_NORM_EPS = 1e-5
_ENDS = ("o_proj.weight", "down_proj.weight")  # of a layer's two branches
_MAX_HEAD_SIZE = 64


class DraftHeads(nn.Module):
    """n independent heads.

    Args:
        config: their shape.
        weights: their tensors by name, see ``new_weights``; cast to ``dtype``.
        dtype: type of the model's hidden states.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """

    def __init__(
        self, config: HeadsConfig, weights: Mapping[str, mx.array], *, dtype: mx.Dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.layers: list[nn.Module] = []
        if config.head == MLP:
            count, dims = config.num_draft_tokens, config.base_hidden_size
            self.weight = mx.zeros((count, dims, dims))
            self.bias = mx.zeros((count, dims))
        else:
            args = _layer_args(config)
            self.layers = [llama.TransformerBlock(args) for _ in range(config.num_draft_tokens)]
        try:
            self.load_weights([(name, x.astype(dtype)) for name, x in weights.items()])
        except ValueError as error:  # its message may have several lines
            raise ValueError(f"heads: {' '.join(str(error).split())}") from None

    @property
    def num_draft_tokens(self) -> int:
        """Number of heads, n."""
        return self.config.num_draft_tokens

    @property
    def remembers(self) -> bool:
        """Whether the heads see rows before the last one."""
        return bool(self.layers)

    def make_cache(self) -> MTPCache:
        """Make fresh caches of the layers; those of an MLP are none."""
        return MTPCache([LayerCache(KVCache(), scope=StepScope()) for _ in self.layers])

    def __call__(self, hidden: mx.array, *, cache: MTPCache | None = None) -> mx.array:
        """Turn final hidden states into those that the drafts come from.

        Args:
            hidden: of ordinary rows that follow those in the cache, ``[1, L, D]``.
            cache: from ``make_cache``; all rows are appended.  None sees these rows only.

        Returns:
            The states of the heads after each row, ``[n, L, D]``.
        """
        if self.config.head == MLP:
            count, dims = self.bias.shape
            blocks = hidden[0] @ self.weight.reshape(-1, dims).T + self.bias.reshape(-1)  # [L, nD]
            return hidden + nn.silu(blocks.reshape(-1, count, dims).swapaxes(0, 1))
        caches = [None] * len(self.layers) if cache is None else cache.layers
        mask = create_attention_mask(hidden, caches[0])
        pairs = zip(self.layers, caches, strict=True)
        return mx.concatenate([layer(hidden, mask, one) for layer, one in pairs], axis=0)


def layer_sizes(dims: int) -> dict[str, int]:
    """Attention heads and feed-forward width of a new layer of width D, as llama has them."""
    fitting = (n for n in range(1, dims + 1) if dims % (2 * n) == 0 and dims // n <= _MAX_HEAD_SIZE)
    width = -(-8 * dims // 3)
    return {
        "num_attention_heads": next(fitting, 1),
        "intermediate_size": -(-width // 32) * 32,
    }


def new_weights(config: HeadsConfig, *, key: mx.array) -> dict[str, mx.array]:
    """Draw the tensors of new heads, float32.

    Those of an MLP, and the last ones of a layer's two branches, are zero.

    Args:
        config: the heads' shape.
        key: random key.
    """
    if config.head == MLP:
        count, dims = config.num_draft_tokens, config.base_hidden_size
        return {"weight": mx.zeros((count, dims, dims)), "bias": mx.zeros((count, dims))}
    block = llama.TransformerBlock(_layer_args(config))
    flat = cast(list[tuple[str, mx.array]], tree_flatten(block.parameters()))
    weights = {}
    for index in range(config.num_draft_tokens):
        for name, like in flat:
            key, own = mx.random.split(key)
            if like.ndim == 1:
                value = mx.ones(like.shape)
            elif name.endswith(_ENDS):
                value = mx.zeros(like.shape)
            else:
                bound = like.shape[-1] ** -0.5
                value = mx.random.uniform(-bound, bound, like.shape, key=own)
            weights[f"layers.{index}.{name}"] = value
    return weights


def _layer_args(config: HeadsConfig) -> llama.ModelArgs:
    return llama.ModelArgs(
        model_type="llama",
        hidden_size=config.base_hidden_size,
        num_hidden_layers=1,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        rms_norm_eps=_NORM_EPS,
        vocab_size=config.base_vocab_size,
    )
