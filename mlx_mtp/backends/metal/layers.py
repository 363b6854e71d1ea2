"""Quantised layers that multiply few rows with our kernels.

``use_kernels`` wraps the quantised linear layers and the embedding of a loaded model.  Up to 32
rows go through the kernel that was chosen for the layer's shape; more rows, and rows of another
type, go through stock MLX.  The kernels have no gradient: models in training keep their layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.matmul import (
    PackedWeight,
    Variant,
    gated_lora_down_kernel,
    skinny_qmm_kernel,
)
from mlx_mtp.backends.metal.operations import Matmul
from mlx_mtp.model.head import select_rows
from mlx_mtp.model.lora import GatedTerm, SharedInput, layers_by_input, linear_dims
from mlx_mtp.model.wrappers import Wrapper, replace

_ALIGNED_RANKS = 8


def packed_weight(layer: Any) -> PackedWeight | None:
    """The weight of an affine quantised layer or embedding; None for any other module."""
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding) or layer.mode != "affine":
        return None
    return PackedWeight(
        weight=layer.weight,
        scales=layer.scales,
        biases=layer["biases"],
        group_size=layer.group_size,
        bits=layer.bits,
    )


class _KernelLayer(Wrapper):
    """A quantised layer that multiplies few rows with the kernel chosen for its shape."""

    def __init__(self, layer: nn.Module, packed: PackedWeight, choice: KernelChoice) -> None:
        super().__init__(layer)
        self._packed = packed
        self._choice = choice

    def select_rows(self, ids: mx.array) -> _KernelLayer:
        """A layer with some rows of the weight ``[N]``, which stay packed."""
        part = select_rows(self.wrapped, ids)
        packed = packed_weight(part)
        assert packed is not None
        return type(self)(part, packed, self._choice)

    def _variant(self, x: mx.array) -> Variant | None:
        """The kernel for ``x`` ``[..., K]``; None for stock MLX."""
        if x.dtype != self._packed.scales.dtype:
            return None
        return self._choice.variant(math.prod(x.shape[:-1]))

    def _multiply(
        self, x: mx.array, variant: Variant, *, gated: GatedTerm | None = None
    ) -> mx.array:
        """Multiply ``[..., K]`` to ``[..., N]``."""
        return skinny_qmm_kernel(
            x, self._packed, variant=variant, gated=gated, simdgroups=self._choice.simdgroups
        )


class KernelLinear(_KernelLayer, nn.QuantizedLinear):
    """A quantised linear layer that multiplies few rows with our kernels."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[..., in]`` to ``[..., out]``."""
        variant = self._variant(x)
        return self.wrapped(x) if variant is None else self._with_bias(self._multiply(x, variant))

    def gated(self, x: mx.array, term: Callable[[mx.array], GatedTerm]) -> mx.array | None:
        """Map ``[1, L, in]`` and add gated low-rank weights; None where no kernel takes ``x``."""
        variant = self._variant(x)
        if variant is None:
            return None
        return self._with_bias(self._multiply(x, variant, gated=term(x)))

    @property
    def has_gated_kernel(self) -> bool:
        """Whether ``gated`` may be called."""
        return self._choice.gated

    def _with_bias(self, y: mx.array) -> mx.array:
        return y + self["bias"] if "bias" in self else y


class KernelEmbedding(_KernelLayer, nn.QuantizedEmbedding):
    """A quantised embedding whose use as an unembedding goes through our kernels."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Look up rows, ``[...]`` to ``[..., D]``."""
        return self.wrapped(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map ``[..., D]`` to logits ``[..., V]``."""
        variant = self._variant(x)
        return self.wrapped.as_linear(x) if variant is None else self._multiply(x, variant)


def matmul_operations(base: nn.Module) -> list[Matmul]:
    """The linear layers and the unembedding of a model by shape and format, the largest first."""
    layers: dict[str, list[Any]] = {}
    for _, layer in base.named_modules():
        is_head = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding) and "lm_head" not in base
        if is_head or isinstance(layer, nn.Linear | nn.QuantizedLinear):
            layers.setdefault(_name(layer), []).append(layer)
    operations = [_matmul(name, group) for name, group in layers.items()]
    sizes = {name: sum(layer.weight.nbytes for layer in group) for name, group in layers.items()}
    return sorted(operations, key=lambda operation: -sizes[operation.name])


def _matmul(name: str, layers: Sequence[Any]) -> Matmul:
    """The operation of layers of one shape."""
    return Matmul(
        name,
        weights=[packed for packed in map(packed_weight, layers) if packed],
        layers=[getattr(layer, "as_linear", layer) for layer in layers],
        num_inputs=linear_dims(layers[0])[0],
        dtype=_floating(layers[0]),
    )


def _floating(layer: Any) -> mx.Dtype:
    """The type of the rows that a layer takes."""
    types = [layer[name].dtype for name in ("weight", "scales") if name in layer]
    return next((dtype for dtype in types if mx.issubdtype(dtype, mx.floating)), mx.bfloat16)


def _name(layer: Any) -> str:
    packed = packed_weight(layer)
    if packed is not None:
        return packed.name
    outputs, inputs = layer.weight.shape
    return f"{outputs}x{inputs} {str(layer.weight.dtype).removeprefix('mlx.core.')}"


def use_kernels(base: nn.Module, choices: Mapping[str, KernelChoice]) -> int:
    """Let the quantised layers of a model use our kernels where these were chosen, in place.

    Args:
        base: the model.
        choices: by ``PackedWeight.name``.

    Returns:
        Number of layers that do.
    """
    layers: dict[str, nn.Module] = {}
    for path, layer in base.named_modules():
        packed = packed_weight(layer)
        choice = choices.get(packed.name) if packed else None
        if packed is None or choice is None or not choice.ours:
            continue
        kind = KernelLinear if isinstance(layer, nn.QuantizedLinear) else KernelEmbedding
        layers[path] = kind(layer, packed, choice)
    replace(base, layers)
    _share_terms(base)
    return len(layers)


def _share_terms(base: nn.Module) -> None:
    """Let the kernels of adapted layers add the low-rank products, formed once per input."""
    for layers in layers_by_input(base):
        ours = [
            x for x in layers if isinstance(x.linear, KernelLinear) and x.linear.has_gated_kernel
        ]
        if ours:
            terms = SharedInput(_StackedTerms([layer.lora_a for layer in ours]))
            for index, layer in enumerate(ours):
                layer.share_terms(terms, index)


class _StackedTerms:
    """The products ``x lora_a`` of layers with the same input, by one kernel.

    Args:
        lora_as: ``[in, r]`` of each layer.
    """

    def __init__(self, lora_as: Sequence[mx.array]) -> None:
        self._firsts = [0, *accumulate(lora_a.shape[1] for lora_a in lora_as[:-1])]
        stacked = mx.concatenate([lora_a.T for lora_a in lora_as])
        self._stacked = mx.pad(stacked, [(0, -stacked.shape[0] % _ALIGNED_RANKS), (0, 0)])
        mx.eval(self._stacked)

    def __call__(self, x: mx.array, gate_split: int) -> list[tuple[mx.array, int]]:
        """Return ``[G, R]`` for ``x`` ``[1, L, in]``, with each layer's first rank in it."""
        low_rank = gated_lora_down_kernel(x, self._stacked, gate_split=gate_split)
        return [(low_rank, first) for first in self._firsts]
