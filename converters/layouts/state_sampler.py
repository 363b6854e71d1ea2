"""The sampler head of a raw state dict, recognised by the shapes of its tensors.

It must have two linear layers, ``[D, 2D]`` and ``[D, D]``, and two normalisations ``[D]``.  Shapes
do not reveal the order of the two halves or a residual: these are assumed, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.converters.layouts.options import CONCATS, Options
from mlx_mtp.model.config import SamplerKind

_LAYER_EPS = 1e-5  # torch.nn.LayerNorm's
_NAMES = {"layer": "LayerNorm", "rms": "RMSNorm"}


@dataclass(frozen=True, kw_only=True)
class Module:
    """One module of the sampler head."""

    name: str
    weight: mx.array
    bias: mx.array | None


@dataclass(kw_only=True)
class SamplerParts:
    """The modules in the order in which they are used."""

    linears: list[Module] = field(default_factory=list)
    norms: list[Module] = field(default_factory=list)

    @property
    def norm(self) -> str:
        """Kind of the normalisation: a LayerNorm has biases."""
        return "rms" if all(module.bias is None for module in self.norms) else "layer"

    @property
    def words(self) -> str | None:
        """The sampler head in words; None if there is none."""
        return f"mlp, {_NAMES[self.norm]}" if self.linears else None


def sort_sampler(tensors: Mapping[str, mx.array]) -> tuple[SamplerParts, list[str]]:
    """Sort tensors into modules; also return problems.

    Args:
        tensors: all tensors of the sampler head; empty if there is none.
    """
    modules: dict[str, dict[str, mx.array]] = {}
    problems, parts = [], SamplerParts()
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            problems.append(f"tensor {name} is unknown: the sampler's end in .weight and .bias")
        modules.setdefault(module, {})[leaf] = tensor
    for name in sorted(modules, key=_natural):
        weight, bias = modules[name].get("weight"), modules[name].get("bias")
        if weight is not None and weight.ndim in (1, 2):
            group = parts.norms if weight.ndim == 1 else parts.linears
            group.append(Module(name=name, weight=weight, bias=bias))
    if tensors and not problems:
        parts.linears.sort(key=lambda module: -module.weight.shape[1])
        problems = _wrong_shapes(tensors, parts) or _wrong_biases(parts)
    return (SamplerParts(), problems) if problems else (parts, [])


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``layer10`` after ``layer9``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _wrong_shapes(tensors: Mapping[str, mx.array], parts: SamplerParts) -> list[str]:
    shapes = [tuple(module.weight.shape) for module in parts.linears + parts.norms]
    dims = shapes[0][0] if shapes else 0
    known = sum(1 + (module.bias is not None) for module in parts.linears + parts.norms)
    if shapes == [(dims, 2 * dims), (dims, dims), (dims,), (dims,)] and known == len(tensors):
        return []
    listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    return [
        "the sampler is unknown: it must have linear layers [D, 2D] and [D, D] and two "
        f"normalisations [D], found {listed[:400]}"
    ]


def _wrong_biases(parts: SamplerParts) -> list[str]:
    for kind, modules in (("linear layers", parts.linears), ("normalisations", parts.norms)):
        if len({module.bias is None for module in modules}) > 1:
            return [f"the sampler's {kind} must both have a bias or none"]
    return []


def convert_sampler(
    parts: SamplerParts, options: Options, *, base_eps: float
) -> tuple[SamplerKind | None, dict[str, mx.array], list[str]]:
    """Convert the modules to the tensors of mlx-mtp's sampler head.

    Args:
        parts: from ``sort_sampler``.
        options: ``concat``, ``norm``, ``norm_eps``, ``residual``.
        base_eps: the base model's epsilon, assumed for an RMSNorm.

    Returns:
        The kind, tensors by name within the sampler head, and notes.

    Raises:
        ValueError: an option contradicts the tensors.
    """
    if not parts.linears:
        return None, {}, []
    norm = options.norm or parts.norm
    if norm == "rms" and parts.norm == "layer":
        raise ValueError(f"layout option norm is rms, but {parts.norms[0].name} has a bias")
    default_eps = _LAYER_EPS if norm == "layer" else base_eps
    kind = SamplerKind(
        norm=norm,
        norm_eps=default_eps if options.norm_eps is None else options.norm_eps,
        bias=parts.linears[0].bias is not None,
        residual=options.residual or "none",
    )
    concat = options.concat or CONCATS[0]
    note = (
        f"sampler: Linear, SiLU, {_NAMES[norm]} (eps {kind.norm_eps:g}) twice, its norms "
        f"{parts.norms[0].name} and {parts.norms[1].name} in that order; concat {concat}, "
        f"residual {kind.residual}; assumed unless specified by options"
    )
    return kind, _tensors(parts, norm=norm, concat=concat), [note]


def _tensors(parts: SamplerParts, *, norm: str, concat: str) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for number, (linear, after) in enumerate(zip(parts.linears, parts.norms, strict=True), 1):
        tensors[f"linear_{number}.weight"] = linear.weight
        tensors[f"norm_{number}.weight"] = after.weight
        if linear.bias is not None:
            tensors[f"linear_{number}.bias"] = linear.bias
        if norm == "layer":  # a missing bias is zero
            bias = mx.zeros_like(after.weight) if after.bias is None else after.bias
            tensors[f"norm_{number}.bias"] = bias
    if concat == "hidden-embedding":  # mlx-mtp's takes the embedding first
        hidden, embedding = mx.split(tensors["linear_1.weight"], 2, axis=1)
        tensors["linear_1.weight"] = mx.concatenate([embedding, hidden], axis=1)
    return tensors
