"""Pairs of low-rank weights, and the layers of the base model that their names refer to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.converters.layouts.common import BaseFacts

# Wrappers that training adds to a model; torch.compile, FSDP and DDP do so at any depth.
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_OUTER = ("base_model", "model", "language_model", "text_model")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both halves of a layer's low-rank weights as they were stored."""

    a: mx.array
    b: mx.array


def pair_up(
    halves: Iterable[tuple[str, str, str, mx.array]],
) -> tuple[dict[str, Pair], list[str]]:
    """Combine the two halves of every layer.

    Args:
        halves: tuples of layer, ``A`` or ``B``, tensor name and tensor.

    Returns:
        The pairs by layer, sorted, and problems with others.
    """
    by_layer: dict[str, dict[str, tuple[str, mx.array]]] = {}
    problems = []
    for layer, half, name, tensor in halves:
        known = by_layer.setdefault(layer, {})
        if half in known:
            problems.append(f"{known[half][0]} and {name} are weights of one layer")
        known[half] = (name, tensor)
    pairs = {}
    for layer, known in sorted(by_layer.items()):
        if len(known) == 2:
            pairs[layer] = Pair(a=known["A"][1], b=known["B"][1])
        else:
            problems.append(f"{layer} has only one of lora_A and lora_B")
    if not by_layer:
        problems.append("the checkpoint contains no LoRA weights")
    return pairs, problems


def ranks(pairs: Mapping[str, Pair]) -> tuple[dict[str, int], list[str]]:
    """Return the ranks by layer of pairs A ``[r, in]`` and B ``[out, r]``, and problems."""
    by_layer, problems = {}, []
    for layer, pair in pairs.items():
        a, b = tuple(pair.a.shape), tuple(pair.b.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            problems.append(f"{layer}: lora_A {a} and lora_B {b} are not of one rank")
        else:
            by_layer[layer] = a[0]
    return by_layer, problems


def resolve_path(
    layer: str, linears: Mapping[str, object], *, any_prefix: bool = False
) -> str | None:
    """Return the layer of the base model that a name in a checkpoint refers to.

    Wrappers are ignored, and a leading ``model.`` or ``language_model.`` is optional.

    Args:
        layer: name in the checkpoint.
        linears: layers of the base model by path.
        any_prefix: whether any prefix is accepted.
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
    """Return the layers of the base model that names in a checkpoint refer to.

    Returns:
        mlx-lm's paths by name in the checkpoint.

    Raises:
        ValueError: a layer does not exist, or two names refer to one layer.
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
    """Return the sorted leaf names of layers."""
    return tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
