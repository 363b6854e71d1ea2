"""MTP-GLoRA: only trained tensors, with fused projections, one shared mask token and RMSNorm.

A checkpoint is a folder ``step-N`` whose ``config.json`` contains the arguments of the training.  A
fused projection has the sum of the ranks and alphas of its parts, so that in effect every part has
a low-rank layer with the same A and its own rows of B.  The embedding row of the one ``<mask>``
token is not trained or saved: it is the base model's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.converters.layouts.common import (
    BaseFacts,
    ConvertedAdapter,
    LayoutSummary,
    LowRankLayer,
    assemble,
    refuse,
)
from mlx_mtp.converters.layouts.low_rank import Pair, leaves, pair_up, ranks, resolve_path
from mlx_mtp.converters.layouts.options import Options
from mlx_mtp.converters.layouts.tables import check_table, token_rows
from mlx_mtp.model.config import SamplerKind
from mlx_mtp.storage.contents import GLORA_LORA, GLORA_SAMPLER

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint

CONFIG = "config.json"
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

_TABLE = re.compile(r"(?:.+\.)?embed_tokens\.weight")
_SAMPLER_TENSORS = [f"{part}_{number}.weight" for number in "12" for part in ("linear", "norm")]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The relevant arguments of the training; None if missing in ``config.json``."""

    draft_length: int | None
    rank: int | None
    alpha: float | None
    use_rslora: bool
    base_model: str | None


@dataclass(kw_only=True)
class GloraTensors:
    """The tensors of a checkpoint by kind."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    sampler: dict[str, mx.array] = field(default_factory=dict)
    table: tuple[str, mx.array] | None = None


def convert_glora(checkpoint: Checkpoint, base: BaseFacts, options: Options) -> ConvertedAdapter:
    """Convert a checkpoint of MTP-GLoRA."""
    arguments, problems = _arguments(checkpoint.configs.get(CONFIG, {}))
    tensors, unknown = _sort(checkpoint.tensors)
    refuse(problems + unknown)
    k = _resolve(
        "draft_length", arguments.draft_length, options.num_draft_tokens, "num_draft_tokens"
    )
    row, notes = _mask_row(tensors, base, options)
    norm_eps = base.norm_eps if options.norm_eps is None else options.norm_eps
    kind = SamplerKind(norm="rms", norm_eps=norm_eps, bias=False, residual="inner")
    return assemble(
        _layers(tensors, arguments, base, options),
        layout="mtp-glora",
        masks=mx.repeat(row, k, axis=0),
        sampler=kind if tensors.sampler else None,
        sampler_tensors=tensors.sampler,
        base_model=arguments.base_model,
        notes=notes,
    )


def describe_glora(checkpoint: Checkpoint) -> LayoutSummary:
    """Describe a checkpoint of MTP-GLoRA."""
    arguments, problems = _arguments(checkpoint.configs.get(CONFIG, {}))
    tensors, unknown = _sort(checkpoint.tensors)
    layer_ranks, rank_problems = ranks(tensors.pairs)
    rank, alpha = arguments.rank, arguments.alpha
    scale = None
    if rank is not None and alpha is not None:
        scale = _scale(alpha, rank, use_rslora=arguments.use_rslora)
    if rank is None and layer_ranks:
        values = list(layer_ranks.values())
        rank = max(values, key=values.count)
    return LayoutSummary(
        layout="mtp-glora",
        base_model=arguments.base_model,
        num_draft_tokens=arguments.draft_length,
        rank=rank,
        scale=scale,
        targets=leaves(tensors.pairs),
        sampler="mlp, RMSNorm, residual inner" if tensors.sampler else None,
        problems=tuple(
            problems + unknown + [text for text in rank_problems if text not in unknown]
        ),
    )


def _arguments(config: Mapping[str, Any]) -> tuple[Arguments, list[str]]:
    """Read the arguments of the training; also return problems."""
    problems = []

    def number(key: str, kinds: tuple[type, ...], minimum: float) -> Any:
        value = config.get(key)
        if value is None or (type(value) in kinds and minimum <= value < 2**31):
            return value
        problems.append(f"{CONFIG}: {key} must be a number of at least {minimum}, got {value!r}")
        return None

    if config.get("lora_bias"):
        problems.append(f"{CONFIG}: lora_bias is not supported, got {config['lora_bias']!r}")
    base_model = config.get("model_path")
    arguments = Arguments(
        draft_length=number("draft_length", (int,), 1),
        rank=number("lora_rank", (int,), 1),
        alpha=number("lora_alpha", (int, float), 0),
        use_rslora=bool(config.get("lora_use_rslora")),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
    )
    return arguments, problems


def _sort(tensors: Mapping[str, mx.array]) -> tuple[GloraTensors, list[str]]:
    groups, halves, problems = GloraTensors(), [], []
    for name, tensor in sorted(tensors.items()):
        if match := GLORA_LORA.fullmatch(name):
            halves.append((match[1], match[2], name, tensor))
        elif match := GLORA_SAMPLER.fullmatch(name):
            key = f"{match[2]}_{int(match[1]) + 1}.weight"
            if key in groups.sampler:
                problems.append(f"tensor {name} exists under two names")
            groups.sampler[key] = tensor
        elif _TABLE.fullmatch(name) and groups.table is None:
            groups.table = (name, tensor)
        elif ".lora_" in name and name.endswith("bias"):
            problems.append(f"tensor {name} is a trained bias, which is not supported")
        else:
            problems.append(f"tensor {name} is unknown")
    groups.pairs, pair_problems = pair_up(halves)
    missing = [name for name in _SAMPLER_TENSORS if name not in groups.sampler]
    if groups.sampler and missing:
        problems.append(f"the sampler lacks {', '.join(missing)}")
    return groups, problems + pair_problems


def _resolve(key: str, own: Any, option: Any, name: str) -> Any:
    """Return a value from ``config.json`` or a layout option, which must not contradict."""
    if own is None and option is None:
        raise ValueError(f"{CONFIG} has no {key}: specify layout option {name}")
    if own is not None and option not in (None, own):
        raise ValueError(f"layout option {name} is {option}, but {CONFIG} has {key} {own}")
    return option if own is None else own


def _mask_row(
    tensors: GloraTensors, base: BaseFacts, options: Options
) -> tuple[mx.array, list[str]]:
    """Return the row ``[1, D]`` that all mask tokens share, and notes on its origin."""
    ids = options.mask_token_ids
    if ids is not None and len(set(ids)) != 1:
        raise ValueError(f"mask_token_ids: this layout has one mask token, got {list(ids)}")
    # The trainer adds the token unless the tokenizer has it.
    own = base.num_tokens if base.mask_token is None else base.mask_token
    if ids is None and own is None:
        raise ValueError(
            "the mask token is the first id after the base model's tokenizer, which is missing: "
            "specify layout option mask_token_ids"
        )
    token = ids[0] if ids is not None else own
    assert token is not None
    if tensors.table is not None:
        name, table = tensors.table
        notes = check_table(name, table, base, mask_ids=(token,))
        if token >= table.shape[0]:
            raise ValueError(f"{name} has {table.shape[0]} rows: no row for token {token}")
        return table[token : token + 1], [f"mask row: row {token} of {name}", *notes]
    if token >= base.vocab_size:
        raise ValueError(
            f"neither the checkpoint nor the embedding of {base.name} ({base.vocab_size} rows) "
            f"has a row for mask token {token}: specify layout option mask_token_ids"
        )
    return token_rows(base, [token]), [f"mask row: row {token} of the base embedding"]


def _layers(
    tensors: GloraTensors, arguments: Arguments, base: BaseFacts, options: Options
) -> list[LowRankLayer]:
    layer_ranks, problems = ranks(tensors.pairs)
    refuse(problems)
    rank = _resolve("lora_rank", arguments.rank, options.rank, "rank")
    alpha = _resolve("lora_alpha", arguments.alpha, options.alpha, "alpha")
    layers: dict[str, LowRankLayer] = {}
    for name, pair in tensors.pairs.items():
        leaf = name.rpartition(".")[2]
        times, rest = divmod(layer_ranks[name], rank)
        if rest or times not in (1, len(FUSED.get(leaf, (leaf,)))):
            raise ValueError(f"{name} has rank {layer_ranks[name]}, but lora_rank is {rank}")
        scale = _scale(times * alpha, layer_ranks[name], use_rslora=arguments.use_rslora)
        for layer in _parts(name, pair, scale, base):
            if layer.path in layers:
                raise ValueError(f"{name}: {layer.path} of {base.name} occurs twice")
            layers[layer.path] = layer
    return list(layers.values())


def _scale(alpha: float, rank: int, *, use_rslora: bool) -> float:
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _parts(name: str, pair: Pair, scale: float, base: BaseFacts) -> list[LowRankLayer]:
    """Return the layers of the base model that one, possibly fused, low-rank layer adapts."""
    lora_a, lora_b = pair.a.T, pair.b.T
    path = resolve_path(name, base.linears)
    if path is not None:
        return [LowRankLayer(path=path, lora_a=lora_a, lora_b=lora_b, scale=scale)]
    owner, _, leaf = name.rpartition(".")
    paths = [resolve_path(f"{owner}.{part}", base.linears) for part in FUSED.get(leaf, ())]
    known = [path for path in paths if path is not None]
    if not known or len(known) != len(paths):
        raise ValueError(f"{name} is no linear layer of {base.name} ({base.model_type})")
    widths = [base.linears[path][1] for path in known]
    if lora_b.shape[1] != sum(widths):
        raise ValueError(
            f"{name}.lora_B has {lora_b.shape[1]} rows, but {', '.join(known)} have "
            f"{' + '.join(map(str, widths))}"
        )
    ends = [sum(widths[: index + 1]) for index in range(len(widths))]
    return [
        LowRankLayer(path=path, lora_a=lora_a, lora_b=lora_b[:, end - width : end], scale=scale)
        for path, width, end in zip(known, widths, ends, strict=True)
    ]
