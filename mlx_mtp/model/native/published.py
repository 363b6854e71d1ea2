"""Turn a checkpoint's tensors of modules into those that ``build_native_module`` takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.native.names import family_of, module_indices, native_tensors
from mlx_mtp.model.parts import Parts, find_parts, module_at, text_model

_EXPERT = re.compile(r"(layer\..*)\.experts\.(\d+)\.(.+)")
_FUSED = re.compile(r"(layer\..*)\.experts\.(gate_up_proj|down_proj)")
_OWN_PARTS = ("projection", "head", "embedding")
_RAW_MEAN = 0.5  # means of zero-centred norms are below it, those of others around 1 and above


def canonical_tensors(
    base: Any, tensors: Mapping[str, mx.array], config: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Rename and transform the tensors of modules as mlx-lm does those of ordinary layers.

    mlx-lm's own ``sanitize`` does it: a module's tensors are passed to it as those of the model's
    last layer.  Experts are stacked, latent attention is split, FP8 becomes bfloat16.

    Norms that are zero-centred when published become plain.  Whether they are is read off the
    values, as converted checkpoints that kept their modules have them in either form: by the mean
    of the decoder layer's first norm, which is around 1 in the plain form.

    Args:
        base: the mlx-lm model.
        tensors: tensors by their names in the checkpoint; others than modules' are left out.
        config: the checkpoint's ``config.json``.

    Returns:
        Tensors by canonical name; see ``names``.
    """
    family, names = family_of(config), native_tensors(tensors, config)
    if family is None:
        return {}
    base = text_model(base)
    done: dict[str, mx.array] = {}
    for index in module_indices(names.values()):
        prefix = f"{index}."
        own = {
            canonical.removeprefix(prefix): tensors[name]
            for name, canonical in names.items()
            if canonical.startswith(prefix)
        }
        norms = {name: own.pop(name) for name in list(own) if _is_norm(name)}
        if family.zero_centred and _is_raw(norms):
            norms = {name: value + 1 for name, value in norms.items()}
        own = _stacked(_sanitised(base, own)) | norms
        projection = own.get("projection.weight")
        is_packed = "projection.scales" in own
        if projection is not None and not is_packed and _is_transposed(projection):
            own["projection.weight"] = projection.T  # of ERNIE-4.5-300B-A47B-PT
        done |= {prefix + name: value for name, value in own.items()}
    return done


def without_copies(
    base: Any, tensors: Mapping[str, mx.array]
) -> tuple[dict[str, mx.array], list[str]]:
    """Leave out embeddings and heads that equal the model's own, which modules share.

    If the model's are quantised, the tensors are compared once quantised likewise.

    Args:
        base: the mlx-lm model.
        tensors: by canonical name.

    Returns:
        The other tensors, and the names of those left out.
    """
    base = text_model(base)
    parts = find_parts(base)
    head = parts.embedding if parts.head is None else parts.head
    own = {"embedding": module_at(base, parts.embedding), "head": module_at(base, head)}
    copies = [
        name
        for name, value in tensors.items()
        for _, part, leaf in [name.split(".", 2)]
        if part in own and leaf == "weight" and _equals(value, own[part])
    ]
    stems = tuple(name.removesuffix("weight") for name in copies)
    dropped = [name for name in tensors if stems and name.startswith(stems)]
    return {name: value for name, value in tensors.items() if name not in dropped}, dropped


def _is_transposed(projection: mx.array) -> bool:
    """Whether a projection ``[D, 2 D]`` is ``[2 D, D]``."""
    return projection.shape[0] == 2 * projection.shape[-1]


def _is_norm(name: str) -> bool:
    part, _, leaf = name.rpartition(".")
    return leaf == "weight" and "norm" in part.rpartition(".")[-1]


def _is_raw(norms: Mapping[str, mx.array]) -> bool:
    """Whether norms are zero-centred, by the mean of one that all modules have."""
    first = norms.get("layer.input_layernorm.weight")
    return first is not None and bool(first.astype(mx.float32).mean() < _RAW_MEAN)


def _sanitised(base: Any, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Pass tensors through the model's ``sanitize`` as those of its last layer."""
    if not hasattr(base, "sanitize"):
        return tensors
    parts: Parts = find_parts(base)
    prefix = f"{parts.backbone}.layers.{len(base.layers) - 1}."
    marked = {prefix + name.removeprefix("layer."): value for name, value in tensors.items()}
    try:
        out: dict[str, mx.array] = base.sanitize(marked)
    except KeyError as error:  # one of the tensors that it joins
        name = str(error.args[0]).replace(prefix, "layer.")
        raise ValueError(f"native modules: the tensor {name} is missing") from None
    kept = {name.removeprefix(prefix): x for name, x in out.items() if name.startswith(prefix)}
    return {
        name if name.partition(".")[0] in _OWN_PARTS else f"layer.{name}": value
        for name, value in kept.items()
    }


def _stacked(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Stack or split experts that ``sanitize`` left as they are."""
    experts: dict[str, dict[int, mx.array]] = {}
    done: dict[str, mx.array] = {}
    for name, value in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = value
        elif match := _FUSED.fullmatch(name):
            done |= dict(_unfused(f"{match[1]}.switch_mlp", match[2], value))
        else:
            done[name] = value
    for name, by_index in experts.items():
        if sorted(by_index) != list(range(len(by_index))):
            raise ValueError(f"native modules: an expert of {name} is missing")
        done[name] = mx.stack([by_index[index] for index in range(len(by_index))])
    return done


def _unfused(prefix: str, kind: str, value: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Split fused experts ``[E, 2 I, D]`` into gate and up; those of ``down_proj`` stay whole."""
    if kind == "down_proj":
        yield f"{prefix}.down_proj.weight", value
        return
    middle = value.shape[-2] // 2
    yield f"{prefix}.gate_proj.weight", value[..., :middle, :]
    yield f"{prefix}.up_proj.weight", value[..., middle:, :]


def _equals(value: mx.array, own: Any) -> bool:
    """Whether a matrix is the weight of a layer, which may be quantised."""
    if isinstance(own, mx.array):
        weight = own
    elif isinstance(own, nn.QuantizedLinear | nn.QuantizedEmbedding):
        weight = own.weight
        if value.dtype != mx.uint32:
            if own.mode == "affine":  # others have scales of bytes
                value = value.astype(own.scales.dtype)
            value = mx.quantize(value, own.group_size, own.bits, mode=own.mode)[0]
    else:
        weight = own.weight
    return value.shape == weight.shape and bool(mx.array_equal(value.astype(weight.dtype), weight))
