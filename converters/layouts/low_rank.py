"""Pairs of low-rank weights: names to layers of the base model, PyTorch's order to ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.converters.layouts.common import BaseFacts

# What training wraps a model in; torch.compile, FSDP and DDP do so at any depth.
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_OUTER = ("base_model", "model", "language_model", "text_model")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both halves of a layer's low-rank weights as they were stored, under the layer's name."""

    a: mx.array
    b: mx.array


def pair_up(
    halves: Iterable[tuple[str, str, str, mx.array]],
) -> tuple[dict[str, Pair], list[str]]:
    """Bring the two halves of each layer together.

    Args:
        halves: (layer, ``A`` or ``B``, tensor name, tensor) each.

    Returns:
        The pairs by layer, sorted, and what is wrong with others.
    """
    found: dict[str, dict[str, tuple[str, mx.array]]] = {}
    problems = []
    for layer, half, name, tensor in halves:
        known = found.setdefault(layer, {})
        if half in known:
            problems.append(f"{known[half][0]} and {name} are weights of one layer")
        known[half] = (name, tensor)
    pairs = {}
    for layer, known in sorted(found.items()):
        if len(known) == 2:
            pairs[layer] = Pair(a=known["A"][1], b=known["B"][1])
        else:
            problems.append(f"{layer} has only one of lora_A and lora_B")
    if not found:
        problems.append("the checkpoint holds no LoRA weights")
    return pairs, problems


def ranks(pairs: Mapping[str, Pair]) -> tuple[dict[str, int], list[str]]:
    """Ranks by layer of pairs in PyTorch's order, A ``[r, in]`` and B ``[out, r]``."""
    found, problems = {}, []
    for layer, pair in pairs.items():
        a, b = tuple(pair.a.shape), tuple(pair.b.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            problems.append(f"{layer}: lora_A {a} and lora_B {b} are not of one rank")
        else:
            found[layer] = a[0]
    return found, problems


def resolve_path(
    layer: str, linears: Mapping[str, object], *, any_prefix: bool = False
) -> str | None:
    """Find the layer of the base model that a checkpoint's name means.

    Wrappers are looked through, and a leading ``model.`` or ``language_model.`` may be there or
    not.

    Args:
        layer: name in the checkpoint.
        linears: layers of the base model by path.
        any_prefix: whether any name may stand in front.
    """
    if layer in linears:
        return layer
    parts = [part for part in layer.split(".") if part not in _TRANSPARENT]
    while parts:
        for prefix in ("", "model.", "language_model.model."):
            if (path := prefix + ".".join(parts)) in linears:
                return path
        if not (any_prefix or parts[0] in _OUTER):
            return None
        del parts[0]
    return None


def resolve_layers(
    layers: Iterable[str], base: BaseFacts, *, any_prefix: bool = False
) -> dict[str, str]:
    """Find every layer in the base model.

    Returns:
        mlx-lm's paths by name in the checkpoint.

    Raises:
        ValueError: a layer is not there, or two names mean one layer.
    """
    resolved: dict[str, str] = {}
    owners: dict[str, str] = {}
    for layer in layers:
        path = resolve_path(layer, base.linears, any_prefix=any_prefix)
        if path is None:
            raise ValueError(f"{layer} is no linear layer of {base.name} ({base.model_type})")
        if path in owners:
            raise ValueError(f"{owners[path]} and {layer} are both {path} of {base.name}")
        resolved[layer], owners[path] = path, layer
    return resolved


def leaves(layers: Iterable[str]) -> tuple[str, ...]:
    """Leaf names of layers, sorted."""
    return tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
