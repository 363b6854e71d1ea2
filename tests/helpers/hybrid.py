"""Tiny random models with recurrent layers, one for each kind of mixer in mlx-lm, in float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.tiny import random_adapter

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rms_norm_eps": 1e-06,
        "num_experts": 0,
        "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe_text",
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rms_norm_eps": 1e-06,
        "num_experts": 4,
        "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 32,
        "rms_norm_eps": 1e-06,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "full_attention_interval": 2,
    },
    "olmo_hybrid": {
        "head_dim": 8,
        "layer_norm_epsilon": 1e-05,
        "attention_bias": False,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "layer_types": [
            "linear_attention",
            "linear_attention",
            "linear_attention",
            "full_attention",
        ],
    },
    "kimi_linear": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "model_max_length": 4096,
        "num_experts": 4,
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
        },
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True,
        "routed_scaling_factor": 1.0,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
    },
    "kimi_k3": {
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "activation_situ_beta": 1.0,
        "attn_res_block_size": 2,
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
        },
    },
    "bailing_moe_linear": {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "max_window_layers": 20,
        "use_bias": False,
        "use_qkv_bias": False,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": None,
        "use_qk_norm": True,
    },
    "bailing_hybrid": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "routed_scaling_factor": 1.0,
        "head_dim": 16,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 32,
        "v_head_dim": 16,
        "q_lora_rank": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "bailing_moe_v3": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "routed_scaling_factor": 1.0,
        "head_dim": 16,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 32,
        "v_head_dim": 16,
        "q_lora_rank": 32,
        "moe_shared_expert_intermediate_size": 32,
        "short_conv_kernel_size": 4,
    },
    "nemotron_h": {
        "num_hidden_layers": 6,
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "n_groups": 2,
        "time_step_limit": (0.001, 100.0),
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-05,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "-", "M", "*", "M", "-"],
    },
    "falcon_h1": {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "mamba_d_conv": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_n_heads": 4,
        "mamba_rms_norm": False,
    },
    "granitemoehybrid": {
        "attention_bias": False,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 32,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "position_embedding_type": "nope",
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-05,
        "state_size": 32,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": "auto",
        "residual_in_fp32": False,
        "chunk_size": 256,
        "ssm_state_size": 32,
    },
    "plamo2": {
        "hidden_size_per_head": 16,
        "rms_norm_eps": 1e-06,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_num_heads": 4,
        "mamba_step": 2,
        "mamba_chunk_size": 256,
        "mamba_enabled": True,
        "attention_window_size": 64,
        "full_attention_idx": None,
    },
    "lfm2": {
        "norm_eps": 1e-05,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "lfm2_moe": {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-05,
        "conv_bias": False,
        "conv_L_cache": 3,
        "full_attn_idxs": [1, 3],
    },
    "gear": {
        "head_dim": 8,
        "layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
        "sliding_window": 64,
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_dt_rank": 4,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    },
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "attention_window_size": 64,
        "embeddings_scale_by_sqrt_dim": True,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "norm_eps": 1e-05,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "mamba": {
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "baichuan_m1": {
        "num_hidden_layers": 3,
        "sliding_window": 64,
        "sliding_window_layers": [1],
        "conv_window": 2,
    },
}
_NESTED = ("qwen3_5", "qwen3_5_moe", "kimi_k3")  # their language model is part of another one
REFUSED = ("baichuan_m1",)
HYBRIDS = tuple(kind for kind in _OWN if kind not in REFUSED)
ROW_BY_ROW = ("jamba", "recurrent_gemma", "rwkv7", "mamba")


def hybrid_base(
    kind: str,
    *,
    seed: int = 0,
    quantised: bool = False,
    dtype: mx.Dtype = mx.float32,
    **overrides: Any,
) -> Any:
    """A tiny model of mlx-lm, the language model if it is part of another one.

    Args:
        kind: one of ``HYBRIDS`` or ``REFUSED``.
        seed: seed of its weights.
        quantised: whether linear layers have 4 bits in groups of 32, where that divides their rows.
        dtype: floating-point type.
        overrides: keys of the configuration.
    """
    text = {**_COMMON, **_OWN[kind], **overrides}
    config = {"model_type": kind, **({"text_config": text} if kind in _NESTED else text)}
    model_class, args_class = _get_classes(config)
    base = model_class(args_class.from_dict(config))
    rng = np.random.default_rng(seed)
    values = [(name, _random(name, like, rng)) for name, like in tree_flatten(base.parameters())]
    base.update(tree_unflatten(values))
    base.eval()
    if quantised:
        nn.quantize(base, group_size=32, bits=4, class_predicate=_can_quantise)
    if dtype != mx.float32:
        keep = getattr(base, "cast_predicate", lambda _: True)
        cast = [
            (name, x.astype(dtype) if x.dtype == mx.float32 and keep(name) else x)
            for name, x in dict(tree_flatten(base.parameters())).items()
        ]
        base.update(tree_unflatten(cast))
    mx.eval(base.parameters())
    inner = getattr(base, "language_model", base)
    if not hasattr(inner, "model_type"):
        inner.model_type = kind
    return inner


def hybrid_mtp(kind: str, *, k: int = 4, **options: Any) -> MTPModel:
    """A tiny model with a random adapter over all linear layers; see ``hybrid_base``."""
    base = hybrid_base(kind, **options)
    config, weights = random_adapter(base, k=k, sampler=False)
    return MTPModel(base, name=f"tiny-{kind}", config=config, weights=weights)


def _random(name: str, like: Any, rng: np.random.Generator) -> mx.array:
    """Values for a parameter with which states neither vanish nor grow."""
    noise = rng.standard_normal(like.shape).astype(np.float32)
    if name.endswith("A_log"):
        return mx.array(np.log(rng.uniform(0.3, 3.0, like.shape)).astype(np.float32))
    if name.endswith("dt_bias"):
        return mx.array(-1.0 + 0.5 * noise)
    if name.endswith(".D"):
        return mx.array(1 + 0.2 * noise)
    if like.ndim <= 1:
        return mx.array(("norm" in name) + 0.2 * noise)
    if "conv" in name and name.endswith("weight"):
        return mx.array(0.6 * noise)
    return mx.array((0.3 if "embed" in name else 1.3 / np.sqrt(like.shape[-1])) * noise)


def _can_quantise(path: str, module: Any) -> bool:
    del path
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
