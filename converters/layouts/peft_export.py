"""Export of an adapter in the layout of PEFT pull request 3541.

Converting the result again gives the same adapter, bit for bit.  What the layout cannot express is
refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.converters.layouts.peft import PREFIX, SAMPLER_LAYERS
from mlx_mtp.converters.layouts.peft_config import EMBEDDING
from mlx_mtp.model.config import MTPConfig, SamplerKind
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MASK_PER_LAYER_EMBEDDINGS, SAMPLER_PREFIX

_MASK_ROWS = f"{PREFIX}model.{EMBEDDING}.token_adapter.trainable_tokens_delta"
_SAMPLER_NUMBERS = {ours: number for number, ours in SAMPLER_LAYERS.items()}
_LARGEST_EXACT = 2**53


def to_peft(
    config: MTPConfig, tensors: Mapping[str, mx.array], *, mask_token_ids: Sequence[int]
) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, mx.array] | None]:
    """Express an adapter in PEFT's layout.

    Args:
        config: the adapter's configuration.
        tensors: its tensors: ``mask_embeddings`` ``[k, D]``, ``*.lora_a`` ``[in, r]``,
            ``*.lora_b`` ``[r, out]``, ``sampler_head.*``.
        mask_token_ids: k ids for the mask tokens, in drafting order.

    Returns:
        ``adapter_config.json``, the tensors of ``adapter_model.safetensors``, and those of
        ``sampler_model.safetensors`` or None.

    Raises:
        ValueError: PEFT's layout cannot express the adapter; the message names the reason.
    """
    if config.noise_ids:
        raise ValueError("PEFT's layout has no place for noise_ids, mask rows of random tokens")
    ids = [int(token) for token in mask_token_ids]
    if len(set(ids)) != len(ids) or len(ids) != config.num_draft_tokens or min(ids) < 0:
        raise ValueError(f"{config.num_draft_tokens} different mask tokens are needed, got {ids}")
    _check_sampler(config.sampler_kind)
    adapter: dict[str, mx.array] = {}
    sampler: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        path, _, half = name.rpartition(".")
        if name == MASK_EMBEDDINGS:
            adapter[_MASK_ROWS] = tensor
        elif half in ("lora_a", "lora_b"):
            adapter[f"{PREFIX}{path}.lora_{half[-1].upper()}.weight"] = tensor.T
        elif name.startswith(SAMPLER_PREFIX):
            sampler[_sampler_name(name)] = tensor
        elif name == MASK_PER_LAYER_EMBEDDINGS:
            raise ValueError(f"PEFT's layout has no place for {name}")
        else:
            raise ValueError(f"tensor {name} is unknown")
    tokens = {"trainable_token_indices": ids, "alora_invocation_tokens": ids}
    return _settings(config, _adapted(config, tensors)) | tokens, adapter, sampler or None


def _adapted(config: MTPConfig, tensors: Mapping[str, mx.array]) -> list[str]:
    """Return the paths of the adapted layers, of which PEFT's layout needs at least one."""
    paths = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    if not paths:
        raise ValueError("the adapter has no low-rank weights, which PEFT's layout requires")
    for path in paths:
        _check_rank(config, path, tensors[f"{path}.lora_a"])
    return paths


def _check_sampler(kind: SamplerKind | None) -> None:
    """Refuse a sampler head that pull request 3541 cannot compute."""
    if kind is None:
        return
    plain = SamplerKind()
    if kind.norm != plain.norm:
        raise ValueError("PEFT's layout has no sampler head with RMSNorm")
    if kind.residual != plain.residual:
        raise ValueError(f"PEFT's layout has no sampler head with residual {kind.residual!r}")
    if not kind.bias:
        raise ValueError("PEFT's layout has no sampler head without bias")
    if kind.norm_eps != plain.norm_eps:
        raise ValueError(f"PEFT's layout has no sampler head with norm_eps {kind.norm_eps}")


def _check_rank(config: MTPConfig, path: str, lora_a: mx.array) -> None:
    if lora_a.ndim == 3:
        raise ValueError(f"PEFT's layout has no low-rank weights per expert, as {path} has them")
    if lora_a.ndim != 2 or lora_a.shape[1] != config.rank_of(path):
        raise ValueError(
            f"{path}.lora_a has shape {tuple(lora_a.shape)}, not rank {config.rank_of(path)}"
        )


def _sampler_name(name: str) -> str:
    layer, _, leaf = name.removeprefix(SAMPLER_PREFIX).rpartition(".")
    if layer not in _SAMPLER_NUMBERS or leaf not in ("weight", "bias"):
        raise ValueError(f"tensor {name} is unknown")
    return f"sampler.mlp.{_SAMPLER_NUMBERS[layer]}.{leaf}"


def _settings(config: MTPConfig, paths: Sequence[str]) -> dict[str, Any]:
    """Return the part of the configuration that concerns low-rank weights."""
    use_rslora, alphas = _alphas(config, paths)
    default = alphas.pop("")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": default,
        "use_rslora": use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(config, paths),
        "rank_pattern": {
            re.escape(path): config.rank_of(path)
            for path in paths
            if config.rank_of(path) != config.rank
        },
        "alpha_pattern": {
            re.escape(path): alpha for path, alpha in alphas.items() if alpha != default
        },
    }


def _targets(config: MTPConfig, paths: Sequence[str]) -> list[str]:
    """Return leaf names that cover every layer of this name, and full paths for the rest."""
    by_leaf: dict[str, list[str]] = {}
    for path in paths:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)
    targets = []
    for leaf, owners in by_leaf.items():
        everywhere = len(owners) == config.base_num_layers
        targets += [leaf] if everywhere else owners
    return sorted(targets)


def _alphas(config: MTPConfig, paths: Sequence[str]) -> tuple[bool, dict[str, float]]:
    """Return the formula and lora_alpha by path; the empty path has the default."""
    pairs = {"": (config.scale, config.rank)}
    pairs |= {path: (config.scale_of(path), config.rank_of(path)) for path in paths}
    missed = ""
    for use_rslora in (False, True):
        alphas = {}
        for path, (scale, rank) in pairs.items():
            alpha = exact_alpha(scale, rank, use_rslora=use_rslora)
            if alpha is None:
                missed = missed or path or "the adapter"
                break
            alphas[path] = alpha
        else:
            return use_rslora, alphas
    scale, rank = pairs.get(missed, pairs[""])
    raise ValueError(
        f"scale {scale!r} of {missed} cannot be expressed in PEFT's layout: no lora_alpha divided "
        f"by its rank {rank} or the root of it is exactly that"
    )


def exact_alpha(scale: float, rank: int, *, use_rslora: bool) -> float | None:
    """Return the ``lora_alpha`` for which PEFT's formula gives exactly this scale, or None.

    Division by a rank that is not a power of two rounds, so some scales cannot be reached.  If an
    alpha exists, the rounded product is one: 300,000 random pairs showed no exception.
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    product = scale * divisor
    if not math.isfinite(product):
        return None
    # Most adapters have an integer, which PEFT expects.
    whole = [round(product)] if abs(product) < _LARGEST_EXACT else []
    return next((alpha for alpha in [*whole, product] if alpha / divisor == scale), None)
