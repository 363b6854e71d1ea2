"""Raw state dicts: bare or wrapped, with axes in either order, under any prefix.

The parts are recognised by names (``lora_A`` and ``lora_B``, "mask", "sampler"), the order of axes
by the base model's shapes, and settings are searched in the values and files that come with them.
The frozen base model may be included.  What cannot be known is assumed, with a note, or must be
specified.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.converters.layouts.common import (
    FLOATS,
    HEAD,
    BaseFacts,
    ConvertedAdapter,
    LayoutSummary,
    LowRankLayer,
    assemble,
    refuse,
)
from mlx_mtp.converters.layouts.low_rank import (
    Pair,
    leaves,
    pair_up,
    resolve_layers,
    resolve_path,
)
from mlx_mtp.converters.layouts.options import Options
from mlx_mtp.converters.layouts.state_sampler import SamplerParts, convert_sampler, sort_sampler
from mlx_mtp.converters.layouts.state_settings import (
    StateSettings,
    find_settings,
    is_training_state,
)
from mlx_mtp.converters.layouts.tables import check_table, mask_rows, random_rows
from mlx_mtp.storage.contents import LORA

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint

_SCALAR = re.compile(r"(.+)\.(?:lora_)?(alpha|scale|scaling)(?:\.default)?")
# Names of a frozen layer inside the module that adds low-rank weights to it.
_FROZEN = r"(?:(?:base|base_layer|linear|orig|original|original_layer|wrapped|inner|embedding)\.)?"
_LAYER = re.compile(rf"(?P<prefix>(?:.+\.)?)(?P<path>layers\.\d+\..+?)\.{_FROZEN}(?:weight|bias)")
_AROUND = re.compile(
    rf"(?P<prefix>(?:.+\.)?)(?:norm|embed_tokens|{HEAD})\.{_FROZEN}(?:weight|bias)"
)
_ROTARY = re.compile(r"(?:.+\.)?inv_freq")
_CONTAINERS = {
    "_orig_mod", "adapter", "base_model", "language_model", "lora", "model", "model_state_dict",
    "module", "net", "network", "state_dict", "text_model", "weights",
}  # fmt: skip


@dataclass(kw_only=True)
class StateTensors:
    """The tensors of a checkpoint by kind, in every kind by name."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    scalars: dict[str, tuple[str, float]] = field(default_factory=dict)
    masks: dict[str, mx.array] = field(default_factory=dict)
    sampler: SamplerParts = field(default_factory=SamplerParts)
    frozen: dict[str, mx.array] = field(default_factory=dict)


def convert_state_dict(
    checkpoint: Checkpoint, base: BaseFacts, options: Options
) -> ConvertedAdapter:
    """Convert a raw state dict."""
    settings = find_settings(checkpoint)
    tensors, problems = _sort(checkpoint.tensors, chosen=options.masks)
    if options.scale is None and options.alpha is None:
        problems += settings.problems
    refuse(problems)
    layers, notes = _layers(tensors, settings, base, options)
    masks, ids, more = _masks(tensors, base, options, checkpoint.added_tokens)
    notes += more + _check_frozen(tensors.frozen, base, ids)
    kind, sampler, more = convert_sampler(tensors.sampler, options, base_eps=base.norm_eps)
    return assemble(
        layers,
        layout="state-dict",
        masks=masks,
        sampler=kind,
        sampler_tensors=sampler,
        base_model=settings.base_model,
        notes=notes + more,
    )


def describe_state_dict(checkpoint: Checkpoint) -> LayoutSummary:
    """Describe a raw state dict; its axes are assumed to be in PyTorch's order."""
    settings = find_settings(checkpoint)
    tensors, problems = _sort(checkpoint.tensors, chosen=None)
    sizes = [min(pair.a.shape, default=0) for pair in tensors.pairs.values()]
    rank = max(sizes, key=sizes.count) if sizes else None
    scale = None
    try:
        scale = settings.of_layer(rank, Options()) if rank else None
    except ValueError as error:
        problems.append(str(error))
    masks = list(tensors.masks.values())
    return LayoutSummary(
        layout="state-dict",
        base_model=settings.base_model,
        num_draft_tokens=masks[0].shape[-2] if len(masks) == 1 and masks[0].ndim > 1 else None,
        rank=rank,
        scale=scale,
        targets=leaves(tensors.pairs),
        sampler=tensors.sampler.words,
        problems=(*problems, *settings.problems),
    )


def _sort(tensors: Mapping[str, mx.array], *, chosen: str | None) -> tuple[StateTensors, list[str]]:
    """Sort tensors by kind; also return problems, with every unknown tensor by name."""
    groups, halves, sampler, rest = StateTensors(), [], {}, {}
    for name, tensor in sorted(tensors.items()):
        if name == chosen:
            groups.masks[name] = tensor
        elif match := LORA.fullmatch(name):
            halves.append((match[1], match[2].upper(), name, tensor))
        elif is_training_state(name):
            continue
        elif "sampler" in name.lower():
            sampler[name] = tensor
        elif (match := _SCALAR.fullmatch(name)) and tensor.size == 1:
            value: Any = tensor.item()
            groups.scalars[match[1]] = (match[2], value)
        elif chosen is None and "mask" in name.lower() and tensor.dtype in FLOATS:
            groups.masks[name] = tensor
        else:
            rest[name] = tensor
    groups.pairs, problems = pair_up(halves)
    groups.sampler, sampler_problems = sort_sampler(sampler)
    for owner, (word, _) in groups.scalars.items():
        if owner not in groups.pairs:
            problems.append(f"tensor {owner}.{word} is unknown")
    words = _CONTAINERS | {word for layer in groups.pairs for word in _prefix(layer)}
    for name, tensor in rest.items():
        if _is_frozen(name, words):
            groups.frozen[name] = tensor
        else:
            problems.append(f"tensor {name} is unknown")
    return groups, problems + sampler_problems


def _prefix(layer: str) -> list[str]:
    """Return the parts of a layer's name before ``layers.N``."""
    before, separator, _ = layer.partition("layers.")
    return before.split(".") if separator else []


def _is_frozen(name: str, words: set[str]) -> bool:
    """Return whether a name, with one of these prefixes, is that of a base model's tensor."""
    if _ROTARY.fullmatch(name):
        return True
    match = _LAYER.fullmatch(name) or _AROUND.fullmatch(name)
    return match is not None and set(match["prefix"].split(".")) - {""} <= words


def _check_frozen(
    frozen: Mapping[str, mx.array], base: BaseFacts, mask_ids: tuple[int, ...]
) -> list[str]:
    """Check that the omitted tensors, but for rows of masks, are the base model's; return notes."""
    notes = []
    for name, tensor in frozen.items():
        match = _LAYER.fullmatch(name)
        if "embed_tokens" in name or HEAD in name:
            if tensor.ndim == 2:
                notes += check_table(name, tensor, base, mask_ids=mask_ids)
        elif match is not None and not _fits_layer(match["path"], tensor, base):
            raise ValueError(f"tensor {name} is unknown and not part of {base.name}")
    if frozen:
        notes.append(
            f"{len(frozen)} tensors of the frozen base model were omitted; only its embedding "
            "was compared"
        )
    return notes


def _fits_layer(path: str, tensor: mx.array, base: BaseFacts) -> bool:
    """Return whether a tensor can be the weight or bias of this layer or normalisation."""
    linear = resolve_path(path, base.linears)
    if linear is None:
        return "norm" in path and tensor.ndim == 1
    in_dims, out_dims = base.linears[linear]
    return tuple(tensor.shape) in ((out_dims, in_dims), (out_dims,))


def _layers(
    tensors: StateTensors, settings: StateSettings, base: BaseFacts, options: Options
) -> tuple[list[LowRankLayer], list[str]]:
    """Return the adapted layers with axes in mlx-mtp's order, and notes."""
    paths = resolve_layers(tensors.pairs, base, any_prefix=True)
    (flip_a, flip_b), notes = _axes(tensors.pairs, paths, base)
    layers = []
    for name, pair in tensors.pairs.items():
        lora_a, lora_b = pair.a.T if flip_a else pair.a, pair.b.T if flip_b else pair.b
        rank = lora_a.shape[1]
        if options.rank not in (None, rank):
            raise ValueError(f"{name} has rank {rank}, but layout option rank is {options.rank}")
        scale = _scale(name, rank, tensors, settings, options)
        layers.append(LowRankLayer(path=paths[name], lora_a=lora_a, lora_b=lora_b, scale=scale))
    guessed = options.scale is None and settings.scale is None and not tensors.scalars
    if guessed and settings.rslora is None:
        notes.append(f"scale: alpha / rank, {layers[0].scale:g} at rank {layers[0].rank}")
    if settings.rank not in (None, *(layer.rank for layer in layers)):
        notes.append(f"the checkpoint specifies rank {settings.rank}, which no layer has")
    return layers, notes


def _scale(
    name: str, rank: int, tensors: StateTensors, settings: StateSettings, options: Options
) -> float:
    """Return the scale of a layer: from the options, its own, or the checkpoint's."""
    own = tensors.scalars.get(name)
    if own is None or options.scale is not None or options.alpha is not None:
        return settings.of_layer(rank, options)
    word, value = own
    return settings.of_layer(rank, Options(alpha=value)) if word == "alpha" else value


def _axes(
    pairs: Mapping[str, Pair], paths: Mapping[str, str], base: BaseFacts
) -> tuple[tuple[bool, bool], list[str]]:
    """Return whether A and B must be transposed to fit all layers, and notes."""
    possible = [(True, True), (False, False), (True, False), (False, True)]
    for name, pair in pairs.items():
        in_dims, out_dims = base.linears[paths[name]]
        fitting = []
        for flip_a, flip_b in possible:
            a, b = tuple(pair.a.shape), tuple(pair.b.shape)
            a, b = a[::-1] if flip_a else a, b[::-1] if flip_b else b
            if len(a) == len(b) == 2 and a[0] == in_dims and b[1] == out_dims and a[1] == b[0] > 0:
                fitting.append((flip_a, flip_b))
        if not fitting:
            raise ValueError(
                f"{name}: lora_A {tuple(pair.a.shape)} and lora_B {tuple(pair.b.shape)} do not "
                f"fit {paths[name]} of {base.name}, {in_dims} to {out_dims}"
            )
        possible = fitting
    if len(possible) == 1:
        return possible[0], []
    note = "the order of axes is not visible from shapes: assumed {}"
    order = "PyTorch's, A [r, in] and B [out, r]" if possible[0] == (True, True) else "mixed"
    return possible[0], [note.format(order)]


def _masks(
    tensors: StateTensors, base: BaseFacts, options: Options, added: Mapping[str, int]
) -> tuple[mx.array, tuple[int, ...], list[str]]:
    """Return mask embeddings ``[k, D]``, their rows if they are from a table, and notes."""
    if options.masks is not None and options.masks not in tensors.masks:
        raise ValueError(f"layout option masks: there is no tensor {options.masks}")
    if len(tensors.masks) > 1:
        raise ValueError(
            f"several tensors may be mask embeddings: {', '.join(tensors.masks)}; choose with "
            "layout option masks"
        )
    if tensors.masks:
        rows, notes = _mask_tensor(*next(iter(tensors.masks.items())), base, options)
        return rows, (), notes
    tables = [
        (name, tensor)
        for name, tensor in tensors.frozen.items()
        if "embed_tokens" in name and tensor.ndim == 2
    ]
    has_ids = options.mask_token_ids is not None
    if tables and options.seed is None:
        ids, note = mask_rows(*tables[0], base, options, added)
        return tables[0][1][mx.array(ids)], ids, [note]
    if has_ids or options.seed is not None:
        rows, note = random_rows(
            base, options, why="no tensor shows how many mask tokens there are"
        )
        return rows, (), [note]
    raise ValueError(
        "no mask embeddings were found: no tensor with 'mask' in its name, no embed_tokens table "
        f"with more rows than the {base.vocab_size} of {base.name}; specify layout option masks, "
        "mask_token_ids or seed"
    )


def _mask_tensor(
    name: str, tensor: mx.array, base: BaseFacts, options: Options
) -> tuple[mx.array, list[str]]:
    """Return mask embeddings ``[k, D]`` from a tensor of this or a similar shape, and notes."""
    if options.seed is not None or options.mask_token_ids is not None:
        raise ValueError(f"{name} contains mask embeddings: seed and mask_token_ids are not needed")
    shape = tuple(tensor.shape)
    if shape[-1:] != (base.hidden_size,) or len(shape) > 3 or shape[:-2] not in ((), (1,)):
        raise ValueError(f"{name} has shape {shape}, not [k, {base.hidden_size}]")
    rows, k = tensor.reshape(-1, base.hidden_size), options.num_draft_tokens
    if rows.shape[0] == 1 and k not in (None, 1):
        return mx.repeat(rows, k, axis=0), [f"mask rows: the one row of {name}, {k} times"]
    if k not in (None, rows.shape[0]):
        raise ValueError(f"{name} has {rows.shape[0]} rows, but num_draft_tokens is {k}")
    return rows, [f"mask rows: {name}"]
