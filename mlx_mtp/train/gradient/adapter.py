"""The adapter that is trained: new, or continued from an existing one.

A new adapter of mask tokens leaves the base model's computation on mask rows unchanged: the
low-rank product and the sampler head's last norm begin at zero, the mask embeddings near the mean
of the token embeddings.  For heads see ``heads``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.loading import check_base, read_any_adapter
from mlx_mtp.model.config import VERA, HeadsConfig, MTPConfig, read_any_config
from mlx_mtp.model.draft_heads import DraftHeads
from mlx_mtp.model.experts import GatedLoRASwitchLinear, is_switch, switch_dims
from mlx_mtp.model.lora import GatedLoRALinear, linear_dims
from mlx_mtp.model.mtp_model import (
    MASK_EMBEDDINGS,
    MASK_PER_LAYER_EMBEDDINGS,
    SAMPLER_PREFIX,
    MTPModel,
    fingerprint,
)
from mlx_mtp.model.parts import PER_LAYER_TABLE, module_at
from mlx_mtp.model.sampler_head import SamplerHead
from mlx_mtp.model.vera import INITIAL_D, LAMBDA_B, LAMBDA_D, is_vera, leaf_of, materialised
from mlx_mtp.model.wrappers import MaskEmbedding
from mlx_mtp.train.gradient.heads import continued_heads, fresh_heads
from mlx_mtp.train.run.checkpoint import WEIGHTS, read_state, state_weights, under
from mlx_mtp.train.settings import HEADS_DRAFTER, MASK_DRAFTER, PROJECTIONS, TrainSettings

AnyConfig = MTPConfig | HeadsConfig

STORAGE = {"adapter_kind", "adapter_bits", "sampler_bits", "adapter_group_size"}
"""Settings that decide how an adapter is stored."""

_OWNERS = ("base.", "heads.")  # prefixes of parameters that an adapter file does not have
_ROUTERS = ("gate", "router", "shared_expert_gate")  # names of layers that choose experts
_SMALLEST = 16  # width of a layer worth an adapter; smaller ones are gates and coefficients
_FEED_FORWARD = re.compile(r"mlp|moe|ffn|feed_forward|ff_|expert|\.fc\d")
_LONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")  # of a list of experts, as dbrx has
_MASK_NOISE = 0.5  # times the standard deviation of the token embeddings


def new_adapter(model: MTPModel, settings: TrainSettings, *, start: Path | None = None) -> MTPModel:
    """Add a trainable adapter to a model and freeze the model itself.

    Args:
        model: loaded without an adapter; its modules are wrapped in place.
        settings: shape of a new adapter; only k and how it is stored may differ from ``start``.
        start: adapter folder to continue from; additional masks begin as its last one.

    Raises:
        ValueError: no layer has one of the target names, or ``start`` does not fit the model.
    """
    if model.adapter_config is not None:
        raise ValueError(f"{model.name} already has an adapter")
    config: AnyConfig
    if start is None and settings.drafter == HEADS_DRAFTER:
        config, weights = fresh_heads(model, settings)
    elif start is None:
        config, weights = _fresh(model, settings)
    else:
        config, weights = _continued(model, settings, start)
    adapted = MTPModel(model.base, name=model.name, config=config, weights=weights)
    adapted.freeze()
    for module in adapted.modules():
        if isinstance(module, GatedLoRALinear | GatedLoRASwitchLinear):
            module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        elif isinstance(module, MaskEmbedding):
            module.unfreeze(keys=[MASK_EMBEDDINGS], recurse=False)
        elif isinstance(module, SamplerHead | DraftHeads):
            module.unfreeze()
    return adapted


def trainable(model: MTPModel) -> dict[str, mx.array]:
    """Trainable parameters of a model by name, float32, in the order of their names."""
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters()))
    return {name: value.astype(mx.float32) for name, value in sorted(flat)}


def adapter_tensors(parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename the result of ``trainable`` to the tensors of an adapter file."""
    return {_tensor_name(name): value for name, value in parameters.items()}


def _tensor_name(parameter: str) -> str:
    module, _, name = parameter.rpartition(".")
    if name != MASK_EMBEDDINGS:
        owner = next((owner for owner in _OWNERS if parameter.startswith(owner)), "")
        return parameter.removeprefix(owner)
    is_per_layer = module.endswith(PER_LAYER_TABLE)
    return MASK_PER_LAYER_EMBEDDINGS if is_per_layer else MASK_EMBEDDINGS


def adapter_settings(config: AnyConfig) -> dict[str, Any]:
    """Values of the settings that a run which starts from an adapter must have."""
    if isinstance(config, HeadsConfig):
        return {"drafter": HEADS_DRAFTER, "head": config.head}
    fixed = {"drafter": MASK_DRAFTER, "rank": config.rank, "scale": config.scale}
    fixed |= {"sampler": config.sampler is not None}
    return fixed | ({"target_modules": config.target_modules} if config.target_modules else {})


def storage_settings(config: AnyConfig) -> dict[str, Any]:
    """Values of the settings in ``STORAGE`` with which an adapter is stored as it was."""
    if not isinstance(config, MTPConfig):
        return {}
    return {
        "adapter_kind": config.adapter_kind,
        "adapter_bits": config.bits,
        "sampler_bits": config.sampler_bits,
        "adapter_group_size": config.group_size,
    }


def read_state_adapter(state: Path) -> tuple[AnyConfig, dict[str, mx.array]]:
    """Read the adapter of a state of a run, which need not be its best one.

    Args:
        state: ``RUN/training/state-0000100`` for its newest weights, with ``/ema`` for the average.

    Returns:
        See ``loading.read_any_adapter``; without the acceptance, which is that of the best one.

    Raises:
        ValueError: the state is damaged or has no average, or ``RUN`` has no adapter.
    """
    state, weights = state_weights(state)
    config = dataclasses.replace(read_any_config(state.resolve().parents[1]), acceptance=())
    try:
        tensors = read_state(state).tensors
    except (OSError, ValueError) as error:
        raise ValueError(f"{state} is damaged: {error}") from None
    if not (parameters := under(WEIGHTS[weights], tensors)):
        raise ValueError(f"{state} has no {weights} weights")
    found = adapter_tensors(parameters)
    return config, materialised(found, config) if is_vera(config) else found


def _fresh(model: MTPModel, settings: TrainSettings) -> tuple[MTPConfig, dict[str, mx.array]]:
    layers = target_layers(model.base, settings)
    if not layers:
        names = ", ".join(settings.target_modules)
        raise ValueError(f"{model.name} has no linear layer named {names}")
    present = {path.rpartition(".")[-1] for path in layers}
    names = [name for name in settings.target_modules if name in present]
    ranks = {path: settings.rank_of(path) for path in sorted(layers)}
    ranks = {path: rank for path, rank in ranks.items() if rank != settings.rank}
    config = MTPConfig(
        num_draft_tokens=settings.num_draft_tokens,
        rank=settings.rank,
        scale=settings.scale,
        target_modules=(*names, *sorted(present - set(names))),
        sampler="mlp" if settings.sampler else None,
        base_model=model.name,
        base_model_type=model.base.model_type,
        base_hidden_size=model.hidden_size,
        base_num_layers=len(model.base.layers),
        base_vocab_size=model.vocab_size,
        base_fingerprint=fingerprint(model.base),
        rank_pattern=ranks,
        **_storage(settings, layers),
    )
    num_keys = len(layers) + 2 + (model.parts.per_layer is not None)
    keys = iter(mx.random.split(mx.random.key(settings.seed), num_keys))
    count = settings.num_draft_tokens
    weights = {MASK_EMBEDDINGS: _mask_embeddings(model.embed, model.vocab_size, count, next(keys))}
    if settings.sampler:
        weights |= _sampler_weights(model.hidden_size, next(keys))
    for path, layer in sorted(layers.items()):
        *experts, dims, out_dims = switch_dims(layer) if is_switch(layer) else linear_dims(layer)
        if is_vera(config):
            weights[f"{path}.{LAMBDA_D}"] = mx.full((config.rank_of(path),), INITIAL_D)
            weights[f"{path}.{LAMBDA_B}"] = mx.zeros((out_dims,))
            continue
        bound = dims**-0.5
        rank = config.rank_of(path)
        shape = (*experts, dims, rank)
        weights[f"{path}.lora_a"] = mx.random.uniform(-bound, bound, shape, key=next(keys))
        weights[f"{path}.lora_b"] = mx.zeros((*experts, rank, out_dims))
    if model.parts.per_layer is not None:
        table = module_at(model.base, model.parts.per_layer)
        size = table.weight.shape[0]
        weights[MASK_PER_LAYER_EMBEDDINGS] = _mask_embeddings(table, size, count, next(keys))
    return config, materialised(weights, config) if is_vera(config) else weights


def _storage(settings: TrainSettings, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Values of a configuration that say how the weights are stored.

    Raises:
        ValueError: VeRA cannot be used with a layer.
    """
    values = _quantisation(settings)
    if settings.adapter_kind != VERA:
        return values
    dims: dict[str, int] = {}
    for path, layer in layers.items():
        if is_switch(layer):
            raise ValueError(f"vera cannot be used with the experts {path}")
        in_dims = linear_dims(layer)[0]
        if dims.setdefault(leaf_of(path), in_dims) != in_dims:
            raise ValueError(
                f"vera cannot be used with {leaf_of(path)}, whose layers differ in their inputs"
            )
    return values | {"adapter_kind": VERA, "vera_seed": settings.seed, "vera_dims": dims}


def _quantisation(settings: TrainSettings) -> dict[str, Any]:
    """Values of a configuration about quantised weights."""
    bits = settings.bits_of_sampler if settings.sampler else 0
    is_quantised = bits or settings.adapter_bits
    size = {"group_size": settings.adapter_group_size} if is_quantised else {}
    return {"bits": settings.adapter_bits, "sampler_bits": bits, **size}


def target_layers(base: nn.Module, settings: TrainSettings) -> dict[str, nn.Module]:
    """Find the layers of a model to adapt, by path.

    With the default names these are all linear layers of the model's layers but routers and
    gates; other names are taken as they are.
    """
    layers = {}
    for path, module in base.named_modules():
        leaf = path.rpartition(".")[-1]
        is_expert = is_switch(module)
        if not (is_expert or isinstance(module, nn.Linear | nn.QuantizedLinear)):
            continue
        if leaf not in settings.target_modules and not (
            settings.target_modules == PROJECTIONS and _is_projection(path, module)
        ):
            continue
        if is_expert and settings.adapt != "all":
            continue
        if not is_expert and _LONE_EXPERT.search(path):  # it gets rows without their places
            continue
        if settings.adapt == "attention" and _FEED_FORWARD.search(path):
            continue
        layers[path] = module
    return layers


def _is_projection(path: str, module: nn.Module) -> bool:
    """Whether a linear layer is a wide one of a layer of the model, and chooses no experts."""
    *owners, leaf = path.split(".")
    in_layer = any(name.isdigit() for name in owners)
    chooses = leaf in _ROUTERS or "router" in owners
    dims = switch_dims(module)[1:] if is_switch(module) else linear_dims(module)
    return in_layer and not chooses and min(dims) >= _SMALLEST


def _mask_embeddings(
    embed: Callable[[mx.array], mx.array], size: int, count: int, key: mx.array
) -> mx.array:
    """Rows near the mean of a sample of a table of ``size`` embeddings, ``[k, D]``."""
    sample = embed(mx.arange(0, size, max(1, size // 4096))).astype(mx.float32)
    noise = mx.random.normal((count, sample.shape[-1]), key=key)
    return sample.mean(axis=0) + _MASK_NOISE * mx.std(sample, axis=0) * noise


def _sampler_weights(dims: int, key: mx.array) -> dict[str, mx.array]:
    """A sampler head that does not change the mask row: its last norm is zero."""
    head = SamplerHead(dims)
    weights = dict(cast(list[tuple[str, mx.array]], tree_flatten(head.parameters())))
    for name, part in zip(("linear_1", "linear_2"), mx.random.split(key), strict=True):
        shape = weights[f"{name}.weight"].shape
        bound = shape[-1] ** -0.5
        weights[f"{name}.weight"] = mx.random.uniform(-bound, bound, shape, key=part)
        weights[f"{name}.bias"] = mx.zeros((dims,))
    weights["norm_2.weight"] = mx.zeros((dims,))
    return {SAMPLER_PREFIX + name: value for name, value in weights.items()}


def _with_storage(config: AnyConfig, settings: TrainSettings, start: Path) -> AnyConfig:
    """The configuration of an adapter that is continued, stored as the settings say.

    Raises:
        ValueError: the settings name ranks, or VeRA for an adapter of trained matrices.
    """
    if isinstance(config, HeadsConfig):
        return config
    if settings.rank_by_layer:
        raise ValueError(f"rank_by_layer cannot be used with {start}, which has its ranks")
    if settings.adapter_kind == VERA:
        if not is_vera(config):
            raise ValueError(f"{start} is not of kind vera, so it cannot be continued as such")
        stored = _quantisation(settings)
        stored |= {"vera_seed": config.vera_seed, "vera_dims": config.vera_dims}
        return dataclasses.replace(config.as_plain(), adapter_kind=VERA, **stored)
    return dataclasses.replace(config.as_plain(), **_quantisation(settings))


def _continued(
    model: MTPModel, settings: TrainSettings, start: Path
) -> tuple[AnyConfig, dict[str, mx.array]]:
    config, weights = read_any_adapter(start)
    config = _with_storage(config, settings, start)
    check_base(model.base, config, adapter=str(start), name=model.name)
    config = dataclasses.replace(
        config, base_fingerprint=fingerprint(model.base)
    )  # not a former one
    if isinstance(config, HeadsConfig):
        return continued_heads(config, weights, settings)
    count = settings.num_draft_tokens
    for name in (MASK_EMBEDDINGS, MASK_PER_LAYER_EMBEDDINGS):
        if name in weights:
            masks = weights[name][:count]
            missing = count - masks.shape[0]
            if missing > 0:
                masks = mx.concatenate([masks, mx.repeat(masks[-1:], missing, axis=0)])
            weights[name] = masks
    return dataclasses.replace(config, num_draft_tokens=count), weights
