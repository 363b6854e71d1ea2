"""GatedLoRALinear: a linear layer whose LoRA weights act on mask rows only.

``y = W x + gate * scale * (x lora_a) lora_b`` (arXiv 2507.11851, section 3.2), with gate 0 on
ordinary rows and 1 on mask rows.  Ordinary rows come first in a step, so the gate is one split
index.  Such an adapter cannot be fused into ``W``.

Few primitives matter more than few operations here: the host pays for each of them in every layer.
Layers with the same input form ``x lora_a`` once (``SharedInput``).  It becomes zero in ordinary
rows, so that one ``addmm`` adds the low-rank product to all rows of ``y``: what it adds to ordinary
rows is 0, which changes no bit but the sign of a zero.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.layout import StepScope

MAX_ZERO_ROWS = 64  # ordinary rows that may take part; more are set apart, as in a prompt
_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)


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


class SharedInput:
    """Layers with the same input, for which something is computed from it once.

    Args:
        compute: returns one value per layer for an input ``[..., L, in]`` and a gate split.
    """

    def __init__(self, compute: Callable[[mx.array, int], Sequence[Any]]) -> None:
        self._compute = compute
        self._input: mx.array | None = None
        self._gate_split = 0
        self._values: list[Any] = []
        self._num_left = 0

    def of(self, x: mx.array, index: int, *, gate_split: int) -> Any:
        """The value of layer number ``index``; all are computed when the first asks for its own."""
        known = self._input is x and self._gate_split == gate_split
        if not known or self._values[index] is None:
            self._input, self._gate_split = x, gate_split
            self._values = list(self._compute(x, gate_split))
            self._num_left = len(self._values)
        value, self._values[index] = self._values[index], None
        self._num_left -= 1
        if self._num_left == 0:
            self._input = None  # so that its memory may be reused
        return value


class StackedWeights:
    """The low-rank weights of layers with the same input, in the shapes that a step takes.

    Their ``lora_a`` are one matrix, of which each layer has a view.

    Args:
        layers: the layers, which have a reference to this object and not the other way round.
    """

    def __init__(self, layers: Sequence[GatedLoRALinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._ends = list(accumulate(layer.lora_a.shape[1] for layer in layers))
        self._known: list[tuple[Any, Any]] = [(None, None)] * len(layers)
        self._lora_a = mx.zeros((0, 0, 0))
        self._lora_bs: list[mx.array] = []

    def __call__(self, x: mx.array, gate_split: int) -> list[tuple[mx.array, mx.array]]:
        """Return what each layer multiplies, for ``x`` ``[1, L, in]``.

        Returns:
            ``x lora_a`` ``[1, L, r]``, zero in rows before the gate split, and ``lora_b``
            ``[1, r, out]``.  With as many axes as ``x`` they need no broadcast.
        """
        if self._has_other_weights():
            self._stack()
        low_rank = x @ self._lora_a
        low_rank[:, :gate_split] = _zeros(gate_split, self._ends[-1], low_rank.dtype)
        if len(self._ends) == 1:
            return [(low_rank, self._lora_bs[0])]
        parts = mx.split(low_rank, self._ends[:-1], axis=-1)
        return list(zip(parts, self._lora_bs, strict=True))

    def _has_other_weights(self) -> bool:
        """Whether weights were replaced, as in training, or never stacked."""
        for ref, (lora_a, lora_b) in zip(self._layers, self._known, strict=True):
            layer: Any = ref()
            if layer["lora_a"] is not lora_a or layer["lora_b"] is not lora_b:
                return True
        return False

    def _stack(self) -> None:
        """Make the matrices."""
        layers: list[Any] = [ref() for ref in self._layers]
        matrix = mx.concatenate([layer.lora_a for layer in layers], axis=1)
        for layer, view in zip(layers, mx.split(matrix, self._ends[:-1], axis=1), strict=True):
            layer.lora_a = view
        self._known = [(layer.lora_a, layer.lora_b) for layer in layers]
        self._lora_a, self._lora_bs = matrix[None], [layer.lora_b[None] for layer in layers]


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
        self._products, self._index = SharedInput(StackedWeights([self])), 0
        self._terms: SharedInput | None = None
        self._term_index = 0

    def share(self, products: SharedInput, index: int) -> None:
        """Share ``x lora_a`` with layers of which this is number ``index``."""
        self._products, self._index = products, index

    def share_terms(self, terms: SharedInput, index: int) -> None:
        """Let the base layer's kernel add the low-rank product.

        Args:
            terms: a ``low_rank`` and a ``first_rank`` for each layer (see ``GatedTerm``).
            index: of this layer.
        """
        self._terms, self._term_index = terms, index

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
        layout, linear = self.scope.layout, self["linear"]  # quicker than by name
        if self._terms is not None and layout is not None and layout.num_masks and self.scope.gated:
            y = linear.gated(x, self._term)
            if y is not None:
                return y
        y = linear(x)
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
        split = layout.gate_split
        if split <= MAX_ZERO_ROWS and x.ndim == 3:
            low_rank, lora_b = self._products.of(x, self._index, gate_split=split)
            return mx.addmm(y, low_rank, lora_b, alpha=self.scale)
        ordinary, masks = mx.split(y, [split], axis=-2)  # quicker than two slices
        low_rank = mx.split(x, [split], axis=-2)[1] @ self.lora_a
        masks = mx.addmm(masks, low_rank, self.lora_b, alpha=self.scale)
        return mx.concatenate([ordinary, masks], axis=-2)

    def _term(self, x: mx.array) -> GatedTerm:
        """What to add to the rows of ``x`` from the gate split on."""
        assert self._terms is not None and self.scope.layout is not None
        split = self.scope.layout.gate_split
        low_rank, first = self._terms.of(x, self._term_index, gate_split=split)
        return GatedTerm(
            low_rank=low_rank,
            first_rank=first,
            lora_b=self.lora_b,
            scale=self.scale,
            gate_split=split,
        )


def layers_by_input(base: nn.Module) -> Iterator[list[GatedLoRALinear]]:
    """Yield the adapted layers of a model, those with the same input together, by their names."""
    for _, module in base.named_modules():
        children = module.children()
        groups = [*_SAME_INPUT, *((name,) for name in children)]
        grouped: set[str] = set()
        for names in groups:
            layers = {
                name: layer
                for name in names
                if name not in grouped and isinstance(layer := children.get(name), GatedLoRALinear)
            }
            grouped |= layers.keys()
            if layers:
                yield list(layers.values())


def share_inputs(base: nn.Module) -> None:
    """Let adapted layers with the same input form ``x lora_a`` together."""
    for layers in layers_by_input(base):
        products = SharedInput(StackedWeights(layers))
        for index, layer in enumerate(layers):
            layer.share(products, index)


@functools.lru_cache(maxsize=1024)
def _zeros(rows: int, ranks: int, dtype: mx.Dtype) -> mx.array:
    zeros = mx.zeros((1, rows, ranks), dtype)
    mx.eval(zeros)
    return zeros


def linear_dims(linear: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer or an unembedding, quantised or not."""
    out_dims, in_dims = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear | nn.QuantizedEmbedding):
        in_dims = in_dims * 32 // linear.bits
    return in_dims, out_dims
