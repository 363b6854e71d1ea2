"""Gated LoRA weights on experts.

A layer of experts gets rows and the experts of each row, and sorts the pairs if there are many, so
its products do not know which rows are masks.  ``GatedExperts`` therefore calls the experts for
ordinary rows and for mask rows apart, and tells the products in it which rows they have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.wrappers import Wrapper, replace


class GatedLoRASwitchLinear(nn.Module):
    """A product per expert plus gated low-rank weights.

    Attributes:
        linear: the base layer, ``SwitchLinear`` or ``QuantizedSwitchLinear``, unchanged.
        lora_a: ``[E, in, r]``.
        lora_b: ``[E, r, out]``.
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

    @classmethod
    def from_base(
        cls,
        linear: Any,
        *,
        lora_a: mx.array,
        lora_b: mx.array,
        scale: float,
        scope: StepScope,
    ) -> GatedLoRASwitchLinear:
        """Wrap a layer of experts.

        Raises:
            ValueError: the shapes do not fit it.
        """
        experts, in_dims, out_dims = switch_dims(linear)
        rank = lora_a.shape[-1]
        shapes = (experts, in_dims, rank), (experts, rank, out_dims)
        if (lora_a.shape, lora_b.shape) != shapes:
            raise ValueError(
                f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit "
                f"{experts} experts of {in_dims} to {out_dims}"
            )
        return cls(linear, lora_a=lora_a, lora_b=lora_b, scale=scale, scope=scope)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map rows ``[..., 1, in]`` to ``[..., 1, out]`` by the experts at ``indices``."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if not self.scope.adapts_experts:
            return y
        pairs: dict[str, Any] = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        low_rank = mx.gather_mm(x, self.lora_a, **pairs)
        return y + self.scale * mx.gather_mm(low_rank, self.lora_b, **pairs)


class GatedExperts(Wrapper):
    """A layer of experts of which some products have gated LoRA weights."""

    def __init__(self, experts: nn.Module, scope: StepScope) -> None:
        super().__init__(experts)
        self._scope = scope

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Map ``[..., L, D]`` and expert indices ``[..., L, k]`` to ``[..., L, k, D]``."""
        layout = self._scope.layout
        if not self._scope.gated or (layout is not None and layout.gate_split == 0):
            return self._call(x, indices, adapts=True)
        if layout is None or layout.num_masks == 0:
            return self._call(x, indices, adapts=False)
        if x.shape[-2] != layout.gate_split + layout.num_masks:
            raise ValueError("an adapter cannot be on experts that do not get the rows in order")
        split = [layout.gate_split]
        parts = zip(
            mx.split(x, split, axis=-2),
            mx.split(indices, split, axis=-2),
            (False, True),
            strict=True,
        )
        outputs = [self._call(rows, chosen, adapts=adapts) for rows, chosen, adapts in parts]
        return mx.concatenate(outputs, axis=-3)

    def _call(self, x: mx.array, indices: mx.array, *, adapts: bool) -> mx.array:
        self._scope.adapts_experts = adapts
        try:
            return self.wrapped(x, indices)
        finally:
            self._scope.adapts_experts = False


def is_switch(module: Any) -> bool:
    """Whether a module is a product per expert."""
    return isinstance(module, SwitchLinear | QuantizedSwitchLinear)


def switch_dims(linear: Any) -> tuple[int, int, int]:
    """Number of experts, and (in, out) of each."""
    return linear.num_experts, linear.input_dims, linear.output_dims


def wrap_gated_experts(base: Any, paths: Iterable[str], scope: StepScope) -> None:
    """Wrap the layers of experts with adapted products, in place.

    Args:
        base: the model.
        paths: of the adapted products.
        scope: the model's step scope.
    """
    owners = {path.rpartition(".")[0] for path in paths}
    modules = {path: module for path, module in base.named_modules() if path in owners}
    replace(base, {path: GatedExperts(module, scope) for path, module in modules.items()})
