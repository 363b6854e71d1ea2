"""What stands at the seams of an mlx-lm model: wrappers that look at the step in progress."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.layout import StepScope


class MaskEmbedding(nn.Module):
    """Token embedding for ordinary rows, learned mask embeddings for mask rows."""

    def __init__(self, embedding: Any, mask_embeddings: mx.array, *, scope: StepScope):
        super().__init__()
        self.embedding = embedding
        self.mask_embeddings = mask_embeddings
        self._scope = scope

    def __call__(self, ids: mx.array) -> mx.array:
        """Map ids ``[B, L]`` to ``[B, L, D]``; ids of mask rows count mask tokens from 0."""
        layout = self._scope.layout
        if layout is None or layout.num_masks == 0:
            return self.embedding(ids)
        split = layout.gate_split
        if split == 0:  # a training forward has mask rows only
            return self.mask_embeddings[ids]
        ordinary = self.embedding(ids[:, :split])
        masks = self.mask_embeddings[ids[:, split:]].astype(ordinary.dtype)
        return mx.concatenate([ordinary, masks], axis=1)

    def as_linear(self, x: mx.array) -> mx.array:
        """Use the embedding table as the unembedding, ``[..., D]`` to ``[..., V]``."""
        return self.embedding.as_linear(x)


class StepRope(nn.Module):
    """A rotary embedding that puts each row of a step at its own position."""

    def __init__(self, rope: Any, *, scope: StepScope):
        super().__init__()
        self.rope = rope
        self._scope = scope

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate ``[1, H, L, Dh]``; rows become a batch of length-1 sequences."""
        layout = self._scope.layout
        if layout is None or layout.is_contiguous:
            return self.rope(x, offset=offset)
        rows = x.transpose(2, 1, 0, 3)  # [L, H, 1, Dh]
        return self.rope(rows, offset=layout.positions_from(offset)).transpose(2, 1, 0, 3)


class HiddenStates(nn.Module):
    """Stands in for a backbone and hands on the hidden states it is given."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        dict.update(self, backbone)
        self.__dict__.update(backbone.__dict__)

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        del args, kwargs
        return hidden
