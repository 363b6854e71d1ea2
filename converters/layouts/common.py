"""What all layouts of checkpoints share: their inputs, their results and the final check.

A layout is a pure function from the tensors and settings of a checkpoint to the tensors of an
adapter.  Names, shapes, ranks and values are checked against the base model, and anything unknown
is refused by name, because an omitted tensor would silently change the drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_mtp.model.config import SamplerKind
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MASK_PER_LAYER_EMBEDDINGS, SAMPLER_PREFIX

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint
    from mlx_mtp.converters.layouts.options import Options

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What a layout needs to know about the base model.

    Attributes:
        name: its name in messages.
        model_type: mlx-lm's name of its architecture.
        hidden_size: width D.
        num_layers: number of its layers.
        vocab_size: rows of its embedding table, padding included.
        norm_eps: epsilon of its normalisations.
        num_tokens: length of its tokenizer, None if it has none.
        mask_token: id of ``<mask>`` in its tokenizer, None if it has no such token.
        named_masks: ids of its tokens ``<mask_1>``, ``<mask_2>``, ..., in this order.
        noise_end: id of the mask token that diffusion training replaces by random ones of lower
            ids; None if none is known.
        block_size: tokens of a block in such training; None if unknown.
        linears: (in, out) of its linear layers by mlx-lm's module path.
        embed: rows ``[n, D]`` of its token embedding.
        unembed: rows ``[n, D]`` of its unembedding, if that is a separate table and available;
            otherwise None.
        quantised: whether these rows are quantised, so that they only approximate the original.
        per_layer_size: width of a token's embeddings for all layers; 0 if the model has none.
    """

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    norm_eps: float
    num_tokens: int | None
    linears: Mapping[str, tuple[int, int]]
    embed: Callable[[Sequence[int]], mx.array]
    unembed: Callable[[Sequence[int]], mx.array] | None = None
    quantised: bool = False
    per_layer_size: int = 0
    mask_token: int | None = None
    named_masks: tuple[int, ...] = ()
    noise_end: int | None = None
    block_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankLayer:
    """The low-rank weights of one linear layer.

    Attributes:
        path: mlx-lm's module path of the layer.
        lora_a: ``[in, r]``.
        lora_b: ``[r, out]``.
        scale: factor of their product.
    """

    path: str
    lora_a: mx.array
    lora_b: mx.array
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[-1]


@dataclass(frozen=True)
class NoiseRows:
    """Mask rows that are random tokens, drawn in every step.

    Attributes:
        count: k.
        ids: lowest id, and highest id plus one.
    """

    count: int
    ids: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ConvertedAdapter:
    """An adapter with the names and shapes of mlx-mtp.

    Attributes:
        layout: name of the layout that it came in.
        tensors: ``mask_embeddings`` ``[k, D]`` unless there are ``noise_ids``, ``*.lora_a``
            ``[in, r]``, ``*.lora_b`` ``[r, out]`` and ``sampler_head.*``, in the types of the
            checkpoint.
        num_draft_tokens: k.
        rank, scale: values of the layers that the two patterns do not name.
        rank_pattern, scale_pattern: values of the other layers, by full module path.
        sampler: kind of the sampler head, None if there is none.
        base_model: base model that the checkpoint names, if any.
        notes: what was assumed or looked up elsewhere, one line per item.
        noise_ids: see ``MTPConfig``.
    """

    layout: str
    tensors: dict[str, mx.array]
    num_draft_tokens: int
    rank: int
    scale: float
    rank_pattern: dict[str, int]
    scale_pattern: dict[str, float]
    sampler: SamplerKind | None
    base_model: str | None
    notes: tuple[str, ...]
    noise_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayoutSummary:
    """What can be known about a checkpoint without its base model.

    Attributes:
        layout: name of its layout, None if it has no known layout.
        base_model: the base model that it names.
        num_draft_tokens: k, None if unknown.
        rank: rank of most layers, None if there are none.
        scale: scale of most layers, None if unknown.
        targets: leaf names of the adapted layers.
        sampler: kind of the sampler head, in words; None if there is none.
        problems: what would be refused and why, one line per item.
    """

    layout: str | None
    base_model: str | None = None
    num_draft_tokens: int | None = None
    rank: int | None = None
    scale: float | None = None
    targets: tuple[str, ...] = ()
    sampler: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One format of checkpoints.

    Attributes:
        name: its name for ``--layout``.
        looks_for: what distinguishes it from others, for messages.
        options: keys of the layout options that it accepts.
        convert: converts a checkpoint; raises ``ValueError`` and does not check its result.
        describe: describes a checkpoint of this layout; never raises ``ValueError``.
    """

    name: str
    looks_for: str
    options: frozenset[str]
    convert: Callable[[Checkpoint, BaseFacts, Options], ConvertedAdapter]
    describe: Callable[[Checkpoint], LayoutSummary]


def refuse(problems: Sequence[str]) -> None:
    """Raise ``ValueError`` with the first problem, if there is one."""
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def assemble(
    layers: Sequence[LowRankLayer],
    *,
    layout: str,
    masks: mx.array | NoiseRows,
    sampler: SamplerKind | None,
    sampler_tensors: Mapping[str, mx.array],
    base_model: str | None,
    notes: Sequence[str] = (),
    default: tuple[int, float] | None = None,
) -> ConvertedAdapter:
    """Combine the parts of an adapter.

    Args:
        layers: adapted layers, at least one.
        layout: name of the layout.
        masks: mask embeddings ``[k, D]``, or that mask rows have random ids.
        sampler: kind of the sampler head, if there is one.
        sampler_tensors: tensors of the sampler head by their names in it (``linear_1.weight``).
        base_model: the base model that the checkpoint names.
        notes: see ``ConvertedAdapter``.
        default: (rank, scale) of layers that no pattern names; by default the most common.
    """
    rows, noise_ids = {}, ()
    if isinstance(masks, NoiseRows):
        k, noise_ids = masks.count, masks.ids
    elif masks.ndim == 2:
        k, rows = masks.shape[0], {MASK_EMBEDDINGS: masks}
    else:
        raise ValueError(f"{MASK_EMBEDDINGS} must be [k, D], its shape is {tuple(masks.shape)}")
    layers = sorted(layers, key=lambda layer: layer.path)  # whatever order they were stored in
    rank, scale = default or _most_common(layers)
    head = {SAMPLER_PREFIX + name: value for name, value in sampler_tensors.items()}
    return ConvertedAdapter(
        layout=layout,
        tensors={**rows, **_low_rank_tensors(layers), **head},
        num_draft_tokens=k,
        rank=rank,
        scale=scale,
        rank_pattern={layer.path: layer.rank for layer in layers if layer.rank != rank},
        scale_pattern={layer.path: layer.scale for layer in layers if layer.scale != scale},
        sampler=sampler,
        base_model=base_model,
        notes=tuple(notes),
        noise_ids=noise_ids,
    )


def _low_rank_tensors(layers: Sequence[LowRankLayer]) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for layer in layers:
        tensors |= {f"{layer.path}.lora_a": layer.lora_a, f"{layer.path}.lora_b": layer.lora_b}
    return tensors


def _most_common(layers: Sequence[LowRankLayer]) -> tuple[int, float]:
    """Return the most common pair of rank and scale, the first one of equals."""
    pairs = [(layer.rank, layer.scale) for layer in layers]
    return max(pairs, key=pairs.count)


def check_adapter(adapter: ConvertedAdapter, base: BaseFacts) -> None:
    """Check an adapter against its base model.

    Raises:
        ValueError: a tensor does not fit, is not of a floating-point type, or is not finite.
    """
    shapes = _sampler_shapes(adapter.sampler, base.hidden_size)
    if not adapter.noise_ids:
        shapes[MASK_EMBEDDINGS] = (adapter.num_draft_tokens, base.hidden_size)
    if base.per_layer_size and not adapter.noise_ids:
        shapes[MASK_PER_LAYER_EMBEDDINGS] = (adapter.num_draft_tokens, base.per_layer_size)
    for name in adapter.tensors:
        path, _, half = name.rpartition(".")
        if half in ("lora_a", "lora_b"):
            in_dims, out_dims = _dims(path, base)
            rank = adapter.rank_pattern.get(path, adapter.rank)
            shapes[name] = (in_dims, rank) if half == "lora_a" else (rank, out_dims)
    if missing := sorted(set(shapes) - set(adapter.tensors)):
        raise ValueError(f"{missing[0]} is missing")
    for name, tensor in sorted(adapter.tensors.items()):
        if name not in shapes:
            raise ValueError(f"{name} does not belong in an adapter")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {base.name} needs {shapes[name]}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be floating point of 16 or 32 bits, got {tensor.dtype}")
        if not mx.isfinite(tensor).all().item():
            raise ValueError(f"{name} contains NaN or infinite values")


def _dims(path: str, base: BaseFacts) -> tuple[int, int]:
    if path not in base.linears:
        raise ValueError(f"{path} is no linear layer of {base.name} ({base.model_type})")
    if path.rpartition(".")[2] == HEAD:
        raise ValueError(f"{path}: low-rank weights of the unembedding are not supported")
    return base.linears[path]


def _sampler_shapes(kind: SamplerKind | None, dims: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a sampler head's tensors by name."""
    if kind is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, width in (("1", 2 * dims), ("2", dims)):
        shapes[f"linear_{number}.weight"] = (dims, width)
        shapes[f"norm_{number}.weight"] = (dims,)
        if kind.bias:
            shapes[f"linear_{number}.bias"] = (dims,)
        if kind.norm == "layer":
            shapes[f"norm_{number}.bias"] = (dims,)
    return {SAMPLER_PREFIX + name: shape for name, shape in shapes.items()}
