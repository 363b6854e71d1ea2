"""The tensors of an adapter file: quantised weights, and vectors in place of low-rank weights.

A file may hold the low-rank weights and the linear layers of the sampler head quantised in groups,
as ``mx.quantize`` packs them (mode ``affine``): ``w = scale * q + bias`` with ``bits`` bits per
q and float16 scales and biases.  The numbers of a group are neighbours along the long axis, so that
each rank has its own scales:

    file                                   weight
    PATH.lora_a.weight, scales, biases     lora_a^T  [r, in]
    PATH.lora_b.weight, scales, biases     lora_b    [r, out]
    sampler_head.linear_1.weight, ...      weight    [out, in]

Loading restores them once, in float32 rounded to float16: the product of q and a scale is exact
there, so every machine gets the same numbers.  A weight whose long axis is no multiple of the group
size stays float16, and so do norms, biases and mask embeddings, which are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from mlx_mtp.model.config import HeadsConfig, MTPConfig
from mlx_mtp.model.vera import is_vera, materialised

Tensors = dict[str, mx.array]

_LOW_RANK = (".lora_a", ".lora_b")
_SAMPLER = ("sampler_head.linear_1.weight", "sampler_head.linear_2.weight")
_PARTS = ("weight", "scales", "biases")


def to_file(
    weights: Mapping[str, mx.array],
    config: MTPConfig | HeadsConfig,
    *,
    dtype: mx.Dtype = mx.float16,
) -> Tensors:
    """Turn weights into the tensors of a file.

    Args:
        weights: by name, see ``loading.read_any_adapter``; of kind ``vera`` with the vectors.
        config: its ``bits``, ``sampler_bits`` and ``group_size`` count.
        dtype: type of what is not quantised.
    """
    tensors = {}
    for name, value in weights.items():
        bits = _bits_of(name, value.shape, config)
        if not bits:
            tensors[name] = value.astype(dtype)
            continue
        packed = mx.quantize(_rows(name, value.astype(mx.float32)), _group_size(config), bits)
        weight, scales, biases = packed
        halves = (weight, scales.astype(mx.float16), biases.astype(mx.float16))
        tensors |= {f"{_owner(name)}.{part}": x for part, x in zip(_PARTS, halves, strict=True)}
    return tensors


def from_file(tensors: Mapping[str, mx.array], config: MTPConfig | HeadsConfig) -> Tensors:
    """Turn the tensors of a file into weights.

    Returns:
        See ``loading.read_any_adapter``: ``lora_a`` and ``lora_b`` of every layer, float16 where
        they were quantised, float32 where they are made of random weights.

    Raises:
        ValueError: a part of a quantised weight is missing or of another shape or type.
    """
    weights, rest = {}, dict(tensors)
    for name in [name for name in tensors if name.endswith(".scales")]:
        owner = name.removesuffix(".scales")
        parts = [rest.pop(f"{owner}.{part}", None) for part in _PARTS]
        name = owner if owner.endswith(_LOW_RANK) else f"{owner}.weight"
        weights[name] = _restored(name, parts, config)
    weights |= rest
    if unknown := [name for name, value in rest.items() if value.dtype == mx.uint32]:
        raise ValueError(f"{unknown[0]} is quantised, but has no scales")
    return materialised(weights, config) if is_vera(config) else weights


def rounded(weights: Mapping[str, mx.array], config: MTPConfig | HeadsConfig) -> Tensors:
    """The weights, float32, that are loaded from a file of these, see ``to_file``."""
    loaded = from_file(to_file(weights, config), config)
    return {name: value.astype(mx.float32) for name, value in loaded.items()}


def is_quantised(config: MTPConfig | HeadsConfig) -> bool:
    """Whether a file of this configuration has quantised weights."""
    return isinstance(config, MTPConfig) and bool(config.bits or config.sampler_bits)


def file_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: MTPConfig | HeadsConfig
) -> Iterator[tuple[str, tuple[int, ...], mx.Dtype]]:
    """Names, shapes and types of what ``to_file`` makes of weights of some shapes."""
    for name, shape in shapes.items():
        bits = _bits_of(name, shape, config)
        if not bits:
            yield name, shape, mx.float16
            continue
        *rows, columns = (*shape[:-2], shape[-1], shape[-2]) if _is_a(name) else shape
        size, owner = _group_size(config), _owner(name)
        yield f"{owner}.weight", (*rows, columns * bits // 32), mx.uint32
        for part in _PARTS[1:]:
            yield f"{owner}.{part}", (*rows, columns // size), mx.float16


def _bits_of(name: str, shape: tuple[int, ...], config: MTPConfig | HeadsConfig) -> int:
    """Bits of a weight of a shape in the file; 0 if it is not quantised."""
    bits = _bits(name, config)
    if not bits:
        return 0
    long = shape[-2] if _is_a(name) else shape[-1]
    return 0 if long % _group_size(config) else bits


def _bits(name: str, config: MTPConfig | HeadsConfig) -> int:
    """Bits of weights of that name, if their shape fits."""
    if not isinstance(config, MTPConfig):
        return 0
    if name.endswith(_LOW_RANK):
        return config.bits
    return config.sampler_bits if name in _SAMPLER else 0


def _restored(name: str, parts: list[Any], config: MTPConfig | HeadsConfig) -> mx.array:
    if any(part is None for part in parts):
        raise ValueError(f"{name} lacks one of {', '.join(_PARTS)}")
    weight, scales, biases = parts
    size, bits = _group_size(config), _bits(name, config)
    if not bits:
        raise ValueError(f"{name} is quantised, but the configuration names no bits for it")
    is_packed = weight.dtype == mx.uint32 and scales.shape == biases.shape and scales.ndim > 1
    if not is_packed or weight.shape != (*scales.shape[:-1], scales.shape[-1] * size * bits // 32):
        raise ValueError(
            f"{name} is not packed in {bits} bits and groups of {size}: its weight is "
            f"{list(weight.shape)} and its scales are {list(scales.shape)}"
        )
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    value = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
    return _rows(name, value.astype(mx.float16))


def _rows(name: str, value: mx.array) -> mx.array:
    """Turn ``lora_a`` so that its long axis is the last one, or back."""
    return mx.contiguous(value.swapaxes(-1, -2)) if _is_a(name) else value


def _is_a(name: str) -> bool:
    return name.endswith(".lora_a")


def _owner(name: str) -> str:
    """Name under which a quantised weight's parts are stored."""
    return name if name.endswith(_LOW_RANK) else name.removesuffix(".weight")


def _group_size(config: MTPConfig | HeadsConfig) -> int:
    return config.group_size if isinstance(config, MTPConfig) else 0
