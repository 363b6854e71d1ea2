"""Quantised layers whose few rows go through our kernels: put into a model that is loaded.

``use_kernels`` replaces a model's quantised linear layers and embedding by twins that hold the same
arrays.  Up to 32 rows go through the kernel that was chosen for the layer's shape; more rows, and
rows of another type, take stock MLX's path.  The kernels have no gradient: models that are trained
keep their own layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.matmul import (
    GatedTerm,
    PackedWeight,
    Variant,
    gated_lora_down_kernel,
    skinny_qmm_kernel,
)
from mlx_mtp.model.lora import GatedLoRALinear, SharedLowRank

ShapeKey = tuple[int, int, int, int, mx.Dtype]  # N, K, bits, group size, type

_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # take the same rows


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


def shape_key(packed: PackedWeight) -> ShapeKey:
    """What a choice depends on."""
    return *packed.shape, packed.bits, packed.group_size, packed.scales.dtype


class _Skinny:
    """What a skinny layer does with few rows."""

    def __init__(self, packed: PackedWeight, choice: KernelChoice) -> None:
        self.packed = packed
        self.choice = choice

    def variant(self, x: mx.array) -> Variant | None:
        """The kernel for ``x`` ``[..., K]``; None is stock MLX."""
        if x.dtype != self.packed.scales.dtype:
            return None
        return self.choice.variant(math.prod(x.shape[:-1]))

    def multiply(
        self, x: mx.array, variant: Variant, *, gated: GatedTerm | None = None
    ) -> mx.array:
        return skinny_qmm_kernel(
            x, self.packed, variant=variant, gated=gated, simdgroups=self.choice.simdgroups
        )


class SkinnyLinear(nn.QuantizedLinear):
    """A quantised linear layer whose few rows go through our kernels."""

    def __init__(self, layer: nn.QuantizedLinear, choice: KernelChoice) -> None:
        nn.Module.__init__(self)
        dict.update(self, layer)  # the same arrays under the same names
        self.__dict__.update(layer.__dict__)
        packed = packed_weight(layer)
        assert packed is not None
        self._skinny = _Skinny(packed, choice)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[..., in]`` to ``[..., out]``."""
        variant = self._skinny.variant(x)
        if variant is None:
            return super().__call__(x)
        return self._with_bias(self._skinny.multiply(x, variant))

    def gated(self, x: mx.array, term: Callable[[mx.array], GatedTerm]) -> mx.array | None:
        """Map ``[1, L, in]`` with gated low-rank weights added; None where stock MLX must."""
        variant = self._skinny.variant(x)
        if variant is None:
            return None
        return self._with_bias(self._skinny.multiply(x, variant, gated=term(x)))

    @property
    def takes_gated(self) -> bool:
        """Whether ``gated`` may be asked."""
        return self._skinny.choice.gated

    def _with_bias(self, y: mx.array) -> mx.array:
        return y + self["bias"] if "bias" in self else y


class SkinnyEmbedding(nn.QuantizedEmbedding):
    """A quantised embedding whose use as an unembedding goes through our kernels."""

    def __init__(self, layer: nn.QuantizedEmbedding, choice: KernelChoice) -> None:
        nn.Module.__init__(self)
        dict.update(self, layer)
        self.__dict__.update(layer.__dict__)
        packed = packed_weight(layer)
        assert packed is not None
        self._skinny = _Skinny(packed, choice)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map ``[..., D]`` to logits ``[..., V]``."""
        variant = self._skinny.variant(x)
        return super().as_linear(x) if variant is None else self._skinny.multiply(x, variant)


def weights_by_shape(base: nn.Module) -> dict[ShapeKey, list[PackedWeight]]:
    """A model's quantised weights by what a choice depends on."""
    found: dict[ShapeKey, list[PackedWeight]] = {}
    for _, layer in base.named_modules():
        if packed := packed_weight(layer):
            found.setdefault(shape_key(packed), []).append(packed)
    return found


def use_kernels(base: nn.Module, choices: Mapping[ShapeKey, KernelChoice]) -> int:
    """Let a model's quantised layers use our kernels where these were chosen, in place.

    Returns:
        How many layers do.
    """
    twins: list[tuple[str, nn.Module]] = []
    for path, layer in base.named_modules():
        packed = packed_weight(layer)
        choice = choices.get(shape_key(packed)) if packed else None
        if choice is None or not choice.ours:
            continue
        is_linear = isinstance(layer, nn.QuantizedLinear)
        twins.append(
            (path, SkinnyLinear(layer, choice) if is_linear else SkinnyEmbedding(layer, choice))
        )
    for path, twin in twins:
        _replace(base, path, twin)
    _share_low_rank(base)
    return len(twins)


def _replace(base: Any, path: str, twin: nn.Module) -> None:
    """Put a module where ``path`` says."""
    *parents, name = path.split(".")
    for part in parents:
        base = base[int(part)] if isinstance(base, list) else base[part]
    base[name] = twin


def _share_low_rank(base: nn.Module) -> None:
    """Let layers that take the same rows form their low-rank products together."""
    for _, module in base.named_modules():
        children = module.children()
        for names in (*_SHARING, *((name,) for name in children)):
            layers = [children.get(name) for name in names]
            free = [
                each
                for each in layers
                if isinstance(each, GatedLoRALinear)
                and isinstance(each.linear, SkinnyLinear)
                and each.linear.takes_gated
                and each.shared is None
            ]
            if free:
                _share(free)


def _share(layers: Sequence[GatedLoRALinear]) -> None:
    shared = SharedLowRank([layer.lora_a for layer in layers], down=gated_lora_down_kernel)
    for index, layer in enumerate(layers):
        layer.share(shared, index)
