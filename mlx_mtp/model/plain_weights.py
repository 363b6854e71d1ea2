"""A base model's weights as transformers names them: dequantised and without an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.model.lora import GatedLoRALinear
from mlx_mtp.model.wrappers import MaskEmbedding

_QUANTISED_LEAVES = ("scales", "biases", "global_scale")
_WRAPPED = {GatedLoRALinear: "linear", MaskEmbedding: "embedding"}  # by name of what they wrap


def plain_weights(base: Any) -> Iterator[tuple[str, mx.array]]:
    """Yield each weight of an mlx-lm model with its name, dequantised where it is quantised.

    What an adapter added is left out, and the wrapped modules have their own paths.
    """
    modules: Any = dict(base.named_modules())
    inner = {
        f"{path}.{name}": path
        for path, module in modules.items()
        for kind, name in _WRAPPED.items()
        if isinstance(module, kind)
    }
    flat: Any = tree_flatten(base.parameters())
    for path, value in flat:
        owner, _, leaf = path.rpartition(".")
        module = modules[owner]
        if isinstance(module, tuple(_WRAPPED)):
            continue
        quantised = "scales" in module
        if quantised and leaf in _QUANTISED_LEAVES:
            continue
        if quantised and leaf == "weight":
            value = mx.dequantize(
                value,
                module["scales"],
                module.get("biases"),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
            )
        yield f"{inner.get(owner, owner)}.{leaf}", value
