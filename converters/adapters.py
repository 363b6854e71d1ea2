"""Key maps of adapter layouts: one function a layout, tensors by name in, tensors by name out.

Values keep their type; the low-rank weights are transposed from PyTorch's ``[out, in]`` order to
ours.  What a layout says beside its tensors (rank, scale, mask tokens) is read by a function next
to the map.  Whatever is not understood is refused by name: a tensor left out would change the
drafts silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

MASK_EMBEDDINGS = "mask_embeddings"

_PEFT_LORA = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_PEFT_MASKS = "embed_tokens.token_adapter.trainable_tokens_delta"
_PEFT_SAMPLER = re.compile(r"sampler\.mlp\.([0235])\.(weight|bias)")
_SAMPLER_NAMES = {"0": "linear_1", "2": "norm_1", "3": "linear_2", "5": "norm_2"}
_SAMPLER_LEAVES = [f"{x}.{leaf}" for x in _SAMPLER_NAMES.values() for leaf in ("weight", "bias")]
# Options of PEFT's LoRA that change what a layer computes and that this reader does not follow.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "modules_to_save",
    "arrow_config",
)


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """What ``adapter_config.json`` of a PEFT checkpoint says about its tensors.

    Attributes:
        rank: rank of the low-rank weights.
        scale: factor of the low-rank product.
        mask_rows: for each mask token in order, its row in the trained embedding rows.
        base_model: name of the base model, or None when the checkpoint does not tell.
    """

    rank: int
    scale: float
    mask_rows: tuple[int, ...]
    base_model: str | None


def read_peft_settings(config: Mapping[str, Any]) -> PeftSettings:
    """Read the settings of the layout of PEFT pull request 3541.

    Raises:
        ValueError: the adapter is of a kind that cannot be converted, or a key is missing or wrong.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{key} is not supported, got {config[key]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none', got {config['bias']!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"r must be a whole number of at least 1, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha must be a number, got {alpha!r}")
    base_model = config.get("base_model_name_or_path")
    return PeftSettings(
        rank=rank,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        mask_rows=_mask_rows(config),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
    )


def _mask_rows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Find the mask tokens, in drafting order, among the trained tokens, in row order."""
    trained = config.get("trainable_token_indices")
    if isinstance(trained, Mapping):
        layers = list(trained)
        if len(layers) != 1 or not layers[0].endswith("embed_tokens"):
            raise ValueError(f"trainable_token_indices must name embed_tokens alone, got {layers}")
        trained = trained[layers[0]]
    rows = _token_ids("trainable_token_indices", trained)
    order = _token_ids("alora_invocation_tokens", config.get("alora_invocation_tokens") or rows)
    if sorted(order) != sorted(rows):
        raise ValueError(
            f"alora_invocation_tokens {order} and trainable_token_indices {rows} "
            "must be the same tokens"
        )
    return tuple(rows.index(token) for token in order)


def _token_ids(key: str, ids: Any) -> list[int]:
    whole = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
    if not whole or len(set(ids)) != len(ids):
        raise ValueError(f"{key} must list the mask tokens' ids, each once, got {ids!r}")
    return ids


def convert_peft(tensors: Mapping[str, mx.array], *, settings: PeftSettings) -> dict[str, mx.array]:
    """Map the tensors of the layout of PEFT pull request 3541 to ours.

    Args:
        tensors: PEFT's tensors and, if the adapter has a sampler, ``sampler.mlp.*``, in one dict.
        settings: from ``read_peft_settings``.

    Returns:
        ``mask_embeddings`` ``[k, D]``, ``*.lora_a`` ``[in, r]``, ``*.lora_b`` ``[r, out]`` and
        ``sampler_head.*``.

    Raises:
        ValueError: a tensor is unknown, missing, or of the wrong shape; the message names it.
    """
    converted: dict[str, mx.array] = {}
    for name, tensor in sorted(tensors.items()):  # so that messages name the same tensor each time
        if match := _PEFT_LORA.fullmatch(name):
            converted[f"{match[1]}.lora_{match[2].lower()}"] = tensor.T
        elif match := _PEFT_SAMPLER.fullmatch(name):
            converted[f"sampler_head.{_SAMPLER_NAMES[match[1]]}.{match[2]}"] = tensor
        elif name.startswith("base_model.model.") and name.endswith(_PEFT_MASKS):
            # Named a delta, yet PEFT stores the trained rows themselves.
            converted[MASK_EMBEDDINGS] = _ordered_rows(name, tensor, settings.mask_rows)
        else:
            raise ValueError(f"unknown tensor {name}")
    if MASK_EMBEDDINGS not in converted:
        raise ValueError(f"no tensor ends in {_PEFT_MASKS}")
    _check_lora_pairs(converted, rank=settings.rank)
    _check_sampler(converted)
    return converted


def target_modules(tensors: Mapping[str, mx.array]) -> tuple[str, ...]:
    """Return the leaf names of the adapted layers, sorted."""
    paths = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return tuple(sorted({path.rpartition(".")[2] for path in paths}))


def has_sampler(tensors: Mapping[str, mx.array]) -> bool:
    """Tell whether converted tensors hold a sampler head."""
    return any(name.startswith("sampler_head.") for name in tensors)


def _ordered_rows(name: str, rows: mx.array, order: tuple[int, ...]) -> mx.array:
    if rows.ndim != 2 or rows.shape[0] != len(order):
        raise ValueError(f"{name} must have {len(order)} rows, its shape is {tuple(rows.shape)}")
    return rows[mx.array(order)]


def _check_lora_pairs(tensors: Mapping[str, mx.array], *, rank: int) -> None:
    """Require both halves of every layer's low-rank weights, of the declared rank."""
    names = [name for name in tensors if name.endswith((".lora_a", ".lora_b"))]
    if not names:
        raise ValueError("the checkpoint holds no LoRA weights")
    for name in names:
        other = name[:-1] + ("b" if name.endswith("a") else "a")
        if other not in tensors:
            raise ValueError(f"{name.rpartition('.')[0]} has only one of lora_A and lora_B")
        shape = tuple(tensors[name].shape)
        if len(shape) != 2 or shape[1 if name.endswith("a") else 0] != rank:
            raise ValueError(f"{name} has shape {shape} after transposing, not of rank {rank}")


def _check_sampler(tensors: Mapping[str, mx.array]) -> None:
    """Require a whole sampler head or none."""
    if has_sampler(tensors):
        missing = [leaf for leaf in _SAMPLER_LEAVES if f"sampler_head.{leaf}" not in tensors]
        if missing:
            raise ValueError(f"the sampler lacks {', '.join(missing)}")
