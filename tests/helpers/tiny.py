"""Tiny random models, adapters and folders: every architecture that is claimed to work, in float32.

Weights come from a seeded NumPy generator, so a model is the same in every process; normalisation
weights differ too, so that models have different fingerprints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_mtp.model.config import (
    CONFIG_FILE,
    LAYER,
    WEIGHTS_FILE,
    AdapterConfig,
    HeadsConfig,
    MTPConfig,
)
from mlx_mtp.model.draft_heads import layer_sizes, new_weights
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.lora import linear_dims
from mlx_mtp.model.mtp_model import (
    MASK_EMBEDDINGS,
    MASK_PER_LAYER_EMBEDDINGS,
    SAMPLER_PREFIX,
    MTPModel,
    fingerprint,
)
from mlx_mtp.model.parts import embedding_dims, find_parts, text_model
from mlx_mtp.model.sampler_head import SamplerHead
from tests.helpers.fixtures_generate import EOS, byte_tokenizer

WINDOW = 6  # of the layers that have one; shorter than the sequences of the tests
BYTE_VOCAB = 260  # the byte tokenizer's

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
    "mistral": {"tie_word_embeddings": False, "rope_theta": 1e6},
    "ministral3": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4096,
        },
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    "phi3": {"tie_word_embeddings": False, "partial_rotary_factor": 0.5},
    "olmo2": {"tie_word_embeddings": False},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
    },
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 32,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "rope_scaling": None,
    },
}
KINDS = tuple(_OWN)
"""Model types; mlx-lm runs ``mistral`` as llama, ``ministral3`` has layers with a window."""


def tiny_config(kind: str, **overrides: Any) -> dict[str, Any]:
    """The ``config.json`` of a tiny model."""
    return {"model_type": kind, **_COMMON, **_OWN[kind], **overrides}


def tiny_base(
    kind: str = "llama", *, seed: int = 0, quantised: bool = False, **overrides: Any
) -> Any:
    """An mlx-lm model with random weights.

    Args:
        kind: one of ``KINDS``.
        seed: seed of the weights.
        quantised: 4-bit weights in groups of 32.
        overrides: keys of its configuration.
    """
    base = build(tiny_config(kind, **overrides), seed=seed)
    if quantised:
        nn.quantize(base, group_size=32, bits=4)
        mx.eval(base.parameters())
    return base


def build(config: dict[str, Any], *, seed: int = 0) -> Any:
    """An mlx-lm model of that configuration with random float32 weights."""
    model_class, args_class = _get_classes(config)
    base = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        base.sanitize({})  # no head among the weights: it ties the embedding
    rng = np.random.default_rng(seed)
    parameters: Any = tree_flatten(base.parameters())
    values = [(name, _random(rng, name, value)) for name, value in parameters]
    base.update(tree_unflatten(values))
    base.eval()
    mx.eval(base.parameters())
    return base


def _random(rng: np.random.Generator, name: str, like: mx.array) -> mx.array:
    """Random values for one parameter; normalisation weights are near 1."""
    noise = rng.standard_normal(like.shape).astype(np.float32)
    if like.ndim == 1:
        return mx.array(("norm" in name) + 0.2 * noise)
    scale = 0.1 if "embed" in name else 1.5 / np.sqrt(like.shape[-1])
    return mx.array(scale * noise)


def adaptable(base: Any) -> list[str]:
    """Paths of the linear layers that an adapter can sit on: no head, no router, no experts."""
    left_out = ("lm_head", "gate", "router", "shared_expert_gate", "layer", "gate.gate_proj")
    return [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
        and not path.endswith(left_out)
        and (base.model_type != "qwen3_moe" or ".self_attn." in path)
    ]


def random_adapter(
    base: Any,
    *,
    k: int = 4,
    rank: int = 4,
    sampler: bool = True,
    scale_of_weights: float = 0.3,
    low_rank: bool = True,
    seed: int = 1,
) -> tuple[MTPConfig, dict[str, mx.array]]:
    """A random adapter over every linear layer that can be adapted.

    Args:
        base: the model it is for.
        k: mask tokens.
        rank: of the low-rank weights.
        sampler: whether it has a sampler head.
        scale_of_weights: standard deviation of the low-rank weights; 0 gives a zeroed adapter.
        low_rank: False makes mask tokens only, which is the fastest adapter.
        seed: seed of the weights.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> mx.array:
        return mx.array((scale * rng.standard_normal(shape)).astype(np.float32))

    base = text_model(base)
    parts, modules = find_parts(base), dict(base.named_modules())
    embedding = modules[parts.embedding]
    dims, paths = embedding_dims(embedding), adaptable(base) if low_rank else []
    weights = {MASK_EMBEDDINGS: normal(k, dims, scale=1.0)}
    if parts.per_layer is not None:
        size = embedding_dims(modules[parts.per_layer])
        weights[MASK_PER_LAYER_EMBEDDINGS] = normal(k, size, scale=1.0)
    for path in paths:
        in_dims, out_dims = linear_dims(modules[path])
        weights[f"{path}.lora_a"] = normal(in_dims, rank, scale=scale_of_weights)
        weights[f"{path}.lora_b"] = normal(rank, out_dims, scale=scale_of_weights)
    if sampler:
        for name, value in dict(tree_flatten(SamplerHead(dims).parameters())).items():
            weights[SAMPLER_PREFIX + name] = normal(*value.shape, scale=0.3)
    config = MTPConfig(
        num_draft_tokens=k,
        rank=rank,
        scale=2.0,
        target_modules=tuple(sorted({path.rpartition(".")[-1] for path in paths})),
        sampler="mlp" if sampler else None,
        base_model=f"tiny-{base.model_type}",
        base_model_type=base.model_type,
        base_hidden_size=dims,
        base_num_layers=len(base.layers),
        base_vocab_size=embedding.weight.shape[0],
        base_fingerprint=fingerprint(base),
    )
    return config, weights


def tiny_mtp(
    kind: str = "llama",
    *,
    k: int = 4,
    rank: int = 4,
    sampler: bool = True,
    seed: int = 0,
    quantised: bool = False,
    scale_of_weights: float = 0.3,
    adapter_seed: int = 1,
    low_rank: bool = True,
    **overrides: Any,
) -> MTPModel:
    """A tiny model with a random adapter; see ``tiny_base`` and ``random_adapter``."""
    base = tiny_base(kind, seed=seed, quantised=quantised, **overrides)
    config, weights = random_adapter(
        base,
        k=k,
        rank=rank,
        sampler=sampler,
        scale_of_weights=scale_of_weights,
        low_rank=low_rank,
        seed=adapter_seed,
    )
    return MTPModel(base, name=f"tiny-{kind}", config=config, weights=weights)


def save_tiny_model(
    folder: Path, kind: str = "llama", *, seed: int = 0, quantised: bool = False, **overrides: Any
) -> Path:
    """Write a model folder with the byte tokenizer, as mlx-lm writes them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"vocab_size": BYTE_VOCAB, "eos_token_id": EOS, **overrides}
    config = tiny_config(kind, **options)
    if quantised:
        config["quantization"] = {"group_size": 32, "bits": 4}
    base = tiny_base(kind, seed=seed, quantised=quantised, **options)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = dict(tree_flatten(base.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    byte_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def random_heads(
    base: Any, *, head: str = "mlp", count: int = 4, scale: float = 0.3, seed: int = 1
) -> tuple[HeadsConfig, dict[str, mx.array]]:
    """Random independent heads; the weights of new ones with noise of that scale."""
    rng = np.random.default_rng(seed)
    base = text_model(base)
    embedding = dict(base.named_modules())[find_parts(base).embedding]
    dims = embedding_dims(embedding)
    sizes: dict[str, Any] = layer_sizes(dims) if head == LAYER else {}
    config = HeadsConfig(
        num_draft_tokens=count,
        head=head,
        base_model=f"tiny-{base.model_type}",
        base_model_type=base.model_type,
        base_hidden_size=dims,
        base_num_layers=len(base.layers),
        base_vocab_size=embedding.weight.shape[0],
        base_fingerprint=fingerprint(base),
        **sizes,
    )
    weights = new_weights(config, key=mx.random.key(seed))
    noise = {name: scale * rng.standard_normal(x.shape) for name, x in weights.items()}
    return config, {
        name: x + mx.array(noise[name].astype(np.float32)) for name, x in weights.items()
    }


def save_adapter(folder: Path, config: AdapterConfig, weights: dict[str, mx.array]) -> Path:
    """Write an adapter folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict()), encoding="utf-8")
    mx.save_safetensors(str(folder / WEIGHTS_FILE), weights)
    return folder


def save_tiny_pair(root: Path, kind: str = "llama", **options: Any) -> tuple[Path, Path]:
    """Write a model folder and a random adapter for it; returns both folders."""
    model = save_tiny_model(root / "model", kind, **options)
    overrides = {"vocab_size": BYTE_VOCAB, "eos_token_id": EOS, **options}
    config, weights = random_adapter(tiny_base(kind, **overrides))
    return model, save_adapter(root / "adapter", config, weights)


def step_ids(layout: StepLayout, ordinary: list[int]) -> mx.array:
    """Ids ``[1, rows]`` of a step with the given ordinary rows."""
    assert len(ordinary) == layout.num_ordinary
    return mx.array([[*ordinary, *layout.mask_offsets.tolist()]])
