"""GatedLoRALinear: a linear layer whose LoRA weights act on mask rows only.

``y = W x + gate * scale * (x lora_a) lora_b`` (arXiv 2507.11851, section 3.2), with gate 0 on
ordinary rows and 1 on mask rows.  Ordinary rows come first in a step, so the gate is one split
index, ordinary rows are exactly what the base layer computes, and the product with the low-rank
weights is only formed for mask rows.  Such an adapter cannot be fused into ``W``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.layout import StepScope

_ALIGNED_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class GatedTerm:
    """What gated LoRA adds to a product: ``scale * low_rank[:, first:first + r] @ lora_b``.

    Attributes:
        low_rank: ``x lora_a`` of the rows from the gate split on, float32 ``[G, R]``.
        first_rank: index of this layer's first rank among the R.
        lora_b: ``[r, N]``, of the type of the rows.
        scale: factor.
        gate_split: index of the first adapted row.
    """

    low_rank: mx.array
    first_rank: int
    lora_b: mx.array
    scale: float
    gate_split: int


class SharedLowRank:
    """The products ``x lora_a`` of layers with the same input, computed once for all of them.

    Args:
        lora_as: ``[in, r]`` of each layer.
        down: computes ``[G, R]`` from rows ``[M, in]``, stacked ranks ``[R, in]`` and a gate split.
    """

    def __init__(self, lora_as: Sequence[mx.array], *, down: Callable[..., mx.array]) -> None:
        self._first = [0, *accumulate(lora_a.shape[1] for lora_a in lora_as)]
        stacked = mx.concatenate([lora_a.T for lora_a in lora_as])
        self._stacked = mx.pad(stacked, [(0, -stacked.shape[0] % _ALIGNED_RANKS), (0, 0)])
        mx.eval(self._stacked)
        self._down = down
        self._rows: mx.array | None = None
        self._split = 0
        self._low_rank = mx.zeros((0, 0))

    def of(self, x: mx.array, index: int, *, gate_split: int) -> tuple[mx.array, int]:
        """Return ``[G, R]`` for ``x`` ``[1, L, in]``, and the index of a layer's first rank."""
        if self._rows is not x or self._split != gate_split:
            rows = x.reshape(-1, x.shape[-1])
            self._low_rank = self._down(rows, self._stacked, gate_split=gate_split)
            self._rows, self._split = x, gate_split
        return self._low_rank, self._first[index]


class GatedLoRALinear(nn.Module):
    """A base linear layer plus gated low-rank weights.

    Attributes:
        linear: the base layer, ``nn.Linear`` or ``nn.QuantizedLinear``, unchanged.
        lora_a: ``[in, r]``.
        lora_b: ``[r, out]``.
        scale: factor of the low-rank product.
    """

    def __init__(
        self,
        linear: Any,
        *,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        scope: StepScope,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.scope = scope
        self.shared: SharedLowRank | None = None
        self._index = 0

    def share(self, shared: SharedLowRank, index: int) -> None:
        """Let the base layer's kernel add the low-rank product of layer number ``index``."""
        self.shared, self._index = shared, index

    @classmethod
    def from_base(
        cls,
        linear: Any,
        *,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        scope: StepScope,
    ) -> GatedLoRALinear:
        """Wrap a linear layer.

        Raises:
            ValueError: the layer is not linear or the shapes do not fit it.
        """
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            raise ValueError(f"{type(linear).__name__} cannot carry gated LoRA weights")
        dims = linear_dims(linear)
        if (lora_a.shape[0], lora_b.shape[-1]) != dims or lora_a.shape[-1] != lora_b.shape[0]:
            raise ValueError(
                f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit "
                f"a layer of {dims[0]} to {dims[1]}"
            )
        return cls(linear, lora_a=lora_a, lora_b=lora_b, scale=scale, scope=scope)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[..., L, in]`` to ``[..., L, out]``; rows from the gate split on are adapted."""
        layout = self.scope.layout
        if self.shared is not None and layout is not None and layout.num_masks and self.scope.gated:
            y = self.linear.gated(x, self._term)
            if y is not None:
                return y
        y = self.linear(x)
        if isinstance(y, mx.array):
            return self._adapted(x, y)
        ends = list(accumulate(part.shape[-1] for part in y))  # afm7's returns q, k and v apart
        return mx.split(self._adapted(x, mx.concatenate(y, axis=-1)), ends[:-1], axis=-1)

    def _adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """Add the low-rank product of ``x`` ``[..., L, in]`` to rows from the gate split on."""
        layout = self.scope.layout
        if not self.scope.gated or (layout is not None and layout.gate_split == 0):
            return mx.addmm(y, x @ self.lora_a, self.lora_b, alpha=self.scale)
        if layout is None or layout.num_masks == 0:
            return y
        split = [layout.gate_split]
        ordinary, masks = mx.split(y, split, axis=-2)  # quicker than two slices
        low_rank = mx.split(x, split, axis=-2)[1] @ self.lora_a
        masks = mx.addmm(masks, low_rank, self.lora_b, alpha=self.scale)
        return mx.concatenate([ordinary, masks], axis=-2)

    def _term(self, x: mx.array) -> GatedTerm:
        """What to add to the rows of ``x`` from the gate split on."""
        assert self.shared is not None and self.scope.layout is not None
        split = self.scope.layout.gate_split
        low_rank, first = self.shared.of(x, self._index, gate_split=split)
        return GatedTerm(
            low_rank=low_rank,
            first_rank=first,
            lora_b=self.lora_b,
            scale=self.scale,
            gate_split=split,
        )


def linear_dims(linear: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer or an unembedding, quantised or not."""
    out_dims, in_dims = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear | nn.QuantizedEmbedding):
        in_dims = in_dims * 32 // linear.bits
    return in_dims, out_dims
