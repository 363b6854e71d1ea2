"""What kind of model a base model is, from its modules and caches; no weight is read."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as lm_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_mtp.model.lora import linear_dims
from mlx_mtp.model.wrappers import WindowLayer

TRAINING_BYTES = 16  # float32 weight, gradient and two moments of Adam
RANK = 32  # of the example of an adapter's size
_HEADS = ("lm_head", "embed_out")


def summarise(base: Any) -> dict[str, Any]:
    """Describe a base model.

    Args:
        base: mlx-lm's model, whose weights may be unread.

    Returns:
        ``layer_kinds``: how many layers of each kind there are; ``linear_layers``: how many linear
        layers of each name an adapter can target; ``training``: what an adapter over them needs;
        ``model_parameters``: how many numbers the weights are.
    """
    text = getattr(base, "language_model", base)
    names: Counter[str] = Counter()
    size = 0
    for path, module in text.named_modules():
        name = path.rpartition(".")[-1]
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and name not in _HEADS:
            names[name] += 1
            size += RANK * sum(linear_dims(module))
    return {
        "layer_kinds": layer_kinds(text),
        "model_parameters": _num_parameters(text),
        "linear_layers": dict(sorted(names.items())),
        "training": (
            f"an adapter of rank {RANK} on all linear layers has {size / 1e6:.1f}M parameters: "
            f"{size * TRAINING_BYTES / 1e9:.2f} GB with gradients and optimizer, next to the "
            "model's weights and activations"
        ),
    }


def layer_kinds(text: Any) -> dict[str, int]:
    """Count the layers of a language model by kind.

    A layer is ``attention``, ``window N`` (attention to the last N tokens), ``recurrent``,
    ``attention and recurrent``, or of the name of its cache; ``, experts`` follows where it has
    some.  Layers that read the cache of another layer are ``shared cache``.
    """
    layers = list(text.layers)
    caches = list(lm_cache.make_prompt_cache(text))
    # Models whose last layers share caches have fewer caches than layers.
    padded = [*caches, *([None] * (len(layers) - len(caches)))]
    kinds: Counter[str] = Counter()
    for layer, cache in zip(layers, padded, strict=False):
        kinds[_kind(layer, cache) + (", experts" if _has_experts(layer) else "")] += 1
    return dict(kinds)


def _kind(layer: Any, cache: Any) -> str:
    if cache is None:
        return "shared cache"
    if isinstance(cache, lm_cache.RotatingKVCache):
        return f"window {cache.max_size}"
    if isinstance(layer, WindowLayer):
        return f"window {layer.window}"
    if isinstance(cache, lm_cache.KVCache | lm_cache.QuantizedKVCache):
        return "attention"
    if isinstance(cache, lm_cache.ArraysCache):
        return "recurrent"
    if isinstance(cache, lm_cache.CacheList):
        parts = list(dict.fromkeys(_kind(layer, part) for part in cache.caches))
        return " and ".join(parts)
    return type(cache).__name__


def _has_experts(layer: Any) -> bool:
    kinds = SwitchLinear | QuantizedSwitchLinear
    return any(isinstance(module, kinds) for module in layer.modules())


def _num_parameters(text: nn.Module) -> int:
    """Return how many numbers the weights are, quantised ones unpacked."""
    total = 0
    for _, module in text.named_modules():
        bits = int(getattr(module, "bits", 0))
        for name, value in cast(list[tuple[str, Any]], list(module.items())):
            if not isinstance(value, mx.array) or name.startswith("_"):
                continue
            if bits and name in ("scales", "biases"):
                continue
            is_packed = bits and value.dtype == mx.uint32
            total += value.size * 32 // bits if is_packed else value.size
    return total
