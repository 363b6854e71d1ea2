"""Tiny random models of every model file of mlx-lm, to check what mlx-mtp does with each family.

A family is a file of ``mlx_lm.models`` that has a ``Model`` and its ``ModelArgs``.  Nothing here
lists them: the configuration follows from the fields of ``ModelArgs`` by rules on their names, so a
new file of mlx-lm is found and built by itself.  ``_OWN`` has what no rule can know.  Layers of
every kind that a file has are there: attention with and without a window, recurrent, experts.

Weights come from a seeded NumPy generator, so a model is the same in every process.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import operator
import pkgutil
import re
import sys
import types
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.settings import TrainSettings

VOCAB = 64
WINDOW = 6  # rows that the layers with a window see; the sequences of the checks are longer
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
WIDTH = HEADS * HEAD_DIM
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
LAYERS = 4
SMALLEST_ADAPTED = 16  # rows of a linear layer; fewer are those of a router or of a gate per head

# Kinds of layers, by the names that the files compare with.
_LAYER_TYPES = (
    "linear_attention",
    "conv",
    "conv_mixer",
    "mamba",
    "sliding_attention",
    "full_attention",
    "attention",
)

_PATTERNS: tuple[tuple[str, Any], ...] = (
    # tables
    (r"vocab_size|num_vocab|embedding_size|vocab_size_per_layer_input", VOCAB),
    # widths
    (r"hidden_size|hidden_dim|d_model|n_embd|model_dim|block_dim|dim_model_base", WIDTH),
    (r"mamba_d_ssm", WIDTH),
    (r".*intermediate_size(_mlp)?|.*ffn_hidden_size|mlp_hidden_size|n_inner|block_ff_dim", 96),
    (r"share_expert_dim|hidden_size_per_layer_input", 32),
    # heads
    (r"linear_num_key_heads", KV_HEADS),
    (r".*num_(attention|query)_heads|n_heads?|num_heads|mamba_n(um)?_heads", HEADS),
    (r"linear_num_value_heads", HEADS),
    (r".*(key_value|kv)_heads|num_attention_groups", KV_HEADS),
    (r".*(head_dim|d_head)|kv_channels|hidden_size_per_head", HEAD_DIM),
    (r".*_lora_rank|.*_low_rank_dim", 32),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"(global_)?partial_rotary_factor|rotary_pct", 0.5),
    # layers
    (r"num_nextn_predict_layers|num_kv_shared_layers", 0),
    (r"num_dense_layers|first_k_dense_replace|moe_layer_start_index|num_kv_reuse_layers", 1),
    (r"num_(hidden_|transformer_)?layers|n_layers?", LAYERS),
    (r"layer_types|layers_block_type|block_types", lambda file: _layer_types(file)),
    (r"sliding_window_layers|full_attn_idxs|full_attention_idx", [1, 3]),
    (
        r"full_attention_interval|layer_group_size|.*sliding_window_pattern|no_rope_layer_interval",
        2,
    ),
    (r"mamba_step|dense_attention_every_n_layers|attn_layer_period|expert_layer_period", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    # windows
    (r"sliding_window(_size)?|attention_window_size|window_size|loop_window_size", WINDOW),
    (r"attention_chunk_size", WINDOW),
    # recurrent layers
    (r"conv_L_cache|.*conv_kernel(_dim|_size)?|conv1d_width|mamba_d_conv", 4),
    (r"conv_window", 2),
    (r".*state_size|mamba_d_state", 32),
    (r"(mamba_)?n_groups", 2),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"time_step_limit", (0.001, 100.0)),
    (r"mamba_expand", 2),
    (r"group_norm_size", 2),
    # experts
    (r"zero_expert_num", 2),
    (r"num_shared_experts?|n_shared_experts|moe_num_shared_experts|cla_share_factor", 1),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|top_k_experts|moe_top_?k|moe_k", EXPERTS_PER_TOKEN),
    (r"n_group|topk_group|num_expert_group|moe_layer_freq|moe_layer_interval", 1),
    (r"decoder_sparse_step|interleave_moe_layer_step", 1),
    (r"mlp_only_layers", [0]),
    (r"is_moe_layer", [index > 0 for index in range(LAYERS)]),
    (r"mlp_layer_types", ["dense"] + ["sparse"] * (LAYERS - 1)),
    (r"topk_method", "noaux_tc"),
    (r"scoring_func", "sigmoid"),
    # numbers
    (r".*(eps|epsilon)", 1e-5),
    (r".*(theta|base_freq|rotary_emb_base)", 10000.0),
    (r"max_position_embeddings|n_positions|n_ctx|block_size|model_max_length", 4096),
    (r"original_max_position_embeddings", 4096),
    (r"(attention|embedding|residual)_multiplier|logits?_scal(ing|e)|scale_(depth|emb)", 1.5),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"routed_scaling_factor|route_scale|moe_router_scaling_factor", 1.5),
    # switches
    (r"tie_word_embeddings", False),
    (r"(attention|mlp|mamba_proj|conv)_bias|use_bias|bias|qkv_bias|use_qkv_bias|no_bias", False),
    (
        r"(use_)?qk_norm|norm_topk_prob|moe_renormalize|use_conv_bias|mamba_conv_bias|post_norm",
        True,
    ),
    (r"rope_scaling", None),
)

# What no rule knows, by family: documented values of its configuration.
_ABSENT = object()
_YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
}
_ROPES = {
    kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
    for kind, theta in (("full_attention", 10000.0), ("sliding_attention", 1000.0))
}
_KDA = {
    "num_heads": HEADS,
    "head_dim": HEAD_DIM,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
}
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy"},
    "exaone4": {
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {"final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "granitemoehybrid": {"mamba_n_heads": 2 * HEADS},
    "mamba2": {"num_heads": 2 * HEADS},
    "internlm3": {"head_dim": HEAD_DIM},
    "glm4_moe_lite": {"partial_rotary_factor": 1.0},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 32,
    },
    "glm_moe_dsa": {
        "index_n_heads": 2,
        "index_topk": 8,
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "kimi_k3": {
        "linear_attn_config": _KDA,
        "activation_situ_beta": 1.0,
        "attn_res_block_size": 2,
        "num_key_value_heads": HEADS,
    },
    "kimi_linear": {"linear_attn_config": _KDA, "num_key_value_heads": HEADS},
    "lfm2": {
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"use_expert_bias": True},
    "llama4": {"num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 1]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
    },
    "mellum": {"rope_parameters": _ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0] * 16,
        }
    },
    "ministral3": {"rope_parameters": {**_YARN, "rope_type": "default"}},
    "mistral4": {"rope_parameters": _YARN},
    "muse_glimmer": {"layer_rope_theta": [0, 10000.0, 10000.0, 0]},
    "muse_spark": {
        "layer_rope_theta": [0, 10000.0, 10000.0, 0],
        "moe_hidden_size": WIDTH,
        "num_shared_experts": 0,
        "mlp_layer_types": None,
        "output_multiplier": 0.2,
        "final_logit_softcapping": 20.0,
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 1, 1]},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 0.5}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "E", "M", "-", "*"],
        "num_hidden_layers": 6,
        "layer_types": _ABSENT,
        "layers_block_type": _ABSENT,
    },
    "olmo_hybrid": {"linear_allow_neg_eigval": True},
    "openelm": {
        "ffn_dim_divisor": 32,
        "ffn_multipliers": [0.5, 0.5, 1.0, 1.0],
        "num_query_heads": [4, 4, 2, 2],
        "num_kv_heads": [2, 2, 1, 1],
    },
    "phi3small": {"gegelu_limit": 20.0, "vocab_size": 100352},  # its code writes to such ids
    "plamo": {"n_shared_head": 2},
    "qwen3_5": {"num_experts": 0},
    "qwen3_5_moe": {"num_experts": EXPERTS},
    "recurrent_gemma": {
        "num_key_value_heads": 1,
        "logits_soft_cap": 30.0,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "spark2_5": {"rope_parameters": _ROPES},
}
_PACKED = {"block": 512, "dtype": "float16"}
_OWN["prism_hadamard_qwen35"] = {
    "hidden_size": 512,  # the smallest block of its rotation
    "tensor_namespace": "mlx-vlm-qwen3_5",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [{**_PACKED, "path": "model.embed_tokens", "embedding": True}]
    + [
        {**_PACKED, "path": f"model.layers.{layer}.mlp.{name}", "embedding": False}
        for layer in range(LAYERS)
        for name in ("gate_proj", "up_proj")
    ],
}
_PROBED = ("hf_olmo",)  # modules that a file imports to see that they are there, for no use

_RULES = tuple((re.compile(pattern), value) for pattern, value in _PATTERNS)


def families() -> list[str]:
    """Names of the model files of mlx-lm that are language models, sorted."""
    names = sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if _is_family(name)]


def _is_family(name: str) -> bool:
    """Whether a file has a model and its arguments; read, as importing all takes seconds."""
    return re.search(r"\bModelArgs\b", _source(name)) is not None


@functools.cache
def _source(name: str) -> str:
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        return file.read()


def module_of(family: str) -> types.ModuleType:
    """Import a family's file.

    Raises:
        ValueError: mlx-lm cannot import it.
    """
    for name in _PROBED:
        sys.modules.setdefault(name, types.ModuleType(name))
    try:
        return importlib.import_module(f"mlx_lm.models.{family}")
    except (ImportError, SystemExit) as error:
        raise ValueError(f"mlx-lm cannot import {family}: {error}") from None


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The ``config.json`` of a tiny model of a family.

    Args:
        family: one of ``families()``.
        overrides: values that replace the derived ones; those of a nested ``text_config`` by name.
    """
    module = module_of(family)
    own = _OWN.get(family, {})
    config: dict[str, Any] = _by_rules(module.ModelArgs, family)
    config_fields = {field.name for field in dataclasses.fields(module.ModelArgs)} - {"vocab_size"}
    if "text_config" in config_fields:
        text_class, text_family = _text_arguments(module)
        values = _OWN.get(text_family, {}) | own | overrides
        outer = {key: value for key, value in values.items() if key in config_fields}
        inner = {key: value for key, value in values.items() if key not in outer}
        text = _by_rules(text_class, text_family) | inner
        kind = f"{family}_text" if family.startswith(text_family) else text_family
        own, overrides = {**outer, "text_config": {"model_type": kind, **text}}, {}
    config |= own | overrides
    present = {key: value for key, value in config.items() if value is not _ABSENT}
    return {**present, "model_type": family}


def _by_rules(arguments: type, family: str) -> dict[str, Any]:
    """Values for the fields of a dataclass that a rule knows; the others keep their defaults."""
    config = {}
    for field in dataclasses.fields(arguments):
        if field.name in ("text_config", "vision_config", "model_type"):
            continue
        for pattern, value in _RULES:
            if pattern.fullmatch(field.name):
                value = value(family) if callable(value) else value
                if value is not None or field.default is dataclasses.MISSING:
                    config[field.name] = value
                break
    if "kv_lora_rank" in config:  # latent attention has as many as there are heads
        config["num_key_value_heads"] = HEADS
    return config


def _layer_types(family: str) -> list[str] | None:
    """Kinds of layers in turn, as far as a file compares with their names."""
    kinds = [kind for kind in _LAYER_TYPES if re.search(rf"['\"]{kind}['\"]", _source(family))]
    if not kinds:
        return None
    if "full_attention" in kinds and "attention" in kinds:
        kinds.remove("attention")
    return [kinds[index % len(kinds)] for index in range(LAYERS)]


def _text_arguments(module: types.ModuleType) -> tuple[type, str]:
    """The arguments' class of a wrapped language model, and the family whose file has it."""
    for part in (module, *(sys.modules[x.__module__] for x in module.Model.__mro__[1:-1])):
        source = inspect.getsource(part)
        calls = re.findall(r"([\w.]+)\.from_dict\(\w+\.text_config\)", source)
        if calls:  # the last one is what is left after all special cases
            owner: Any = operator.attrgetter(calls[-1])(part)
            return owner, owner.__module__.rpartition(".")[-1]
    raise ValueError(f"{module.__name__} has a text_config of an unknown class")


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    bits: int | None = None,
    **overrides: Any,
) -> Any:
    """An mlx-lm model of a family; see ``tiny_config`` and ``build``."""
    return build(tiny_config(family, **overrides), seed=seed, dtype=dtype, bits=bits)


def with_adapter(
    base: Any, *, num_draft_tokens: int = 4, rank: int = 4, sampler: bool = True, seed: int = 1
) -> MTPModel:
    """Add a random adapter on every linear layer but head, routers and tiny gates.

    It is the adapter that training would make, with random values in all that is trained.

    Args:
        base: an mlx-lm model; its modules are wrapped in place.
        num_draft_tokens: k.
        rank: rank of the low-rank weights.
        sampler: whether it has a sampler head.
        seed: seed of the values.

    Raises:
        ValueError: the model is refused, or its mask rows are.
    """
    model = MTPModel(base)
    settings = TrainSettings(
        num_draft_tokens=num_draft_tokens,
        rank=rank,
        sampler=sampler,
        target_modules=_targets(model),
    )
    model = new_adapter(model, settings)
    rng = np.random.default_rng(seed)
    values = [
        (name, _random_trainable(rng, name, value)) for name, value in trainable(model).items()
    ]
    model.update(tree_unflatten(values))
    model.set_dtype(model.dtype, lambda kind: mx.issubdtype(kind, mx.floating))
    model.eval()
    mx.eval(model.parameters())
    return model


def _targets(model: MTPModel) -> tuple[str, ...]:
    """Leaf names of linear layers that an adapter can sit on."""
    chosen, left_out = set(), set()
    for path, module in model.base.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            in_layer = re.search(r"\.\d+\.", path) is not None
            usual = (
                in_layer and ".experts." not in path and module.weight.shape[0] >= SMALLEST_ADAPTED
            )
            (chosen if usual else left_out).add(path.rpartition(".")[-1])
    return tuple(sorted(chosen - left_out))


def _random_trainable(rng: np.random.Generator, name: str, like: mx.array) -> mx.array:
    noise = rng.standard_normal(like.shape).astype(np.float32)
    return mx.array(noise if name.endswith(MASK_EMBEDDINGS) else 0.3 * noise)


def build(
    config: dict[str, Any], *, seed: int = 0, dtype: mx.Dtype = mx.float32, bits: int | None = None
) -> Any:
    """An mlx-lm model with random weights.

    Args:
        config: see ``tiny_config``.
        seed: seed of the weights.
        dtype: type of the weights.
        bits: bits of quantised weights, in groups of 32; None does not quantise.
    """
    model_class, args_class = _get_classes(config)
    base = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        base.sanitize({})  # no head among the weights: it ties the embedding
    rng = np.random.default_rng(seed)
    parameters: Any = tree_flatten(base.parameters())
    base.update(tree_unflatten([(name, _random(rng, name, x)) for name, x in parameters]))
    base.set_dtype(dtype)
    if bits is not None:
        _quantise(base, bits)
    base.eval()
    mx.eval(base.parameters())
    return base


def _quantise(base: Any, bits: int) -> None:
    """Quantise as ``mlx_lm.convert`` does, where the width allows it."""
    wanted = getattr(base, "quant_predicate", None) or (lambda path, module: True)

    def chosen(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        value = wanted(path, module)
        return {"group_size": 32, "bits": value["bits"]} if isinstance(value, dict) else value

    nn.quantize(base, group_size=32, bits=bits, class_predicate=chosen)


def _random(rng: np.random.Generator, name: str, like: mx.array) -> mx.array:
    """Random values for one parameter: such that states decay and hidden states neither vanish."""
    last = name.rpartition(".")[-1]
    if not mx.issubdtype(like.dtype, mx.floating):
        return _random_integers(rng, like)
    noise = rng.standard_normal(like.shape).astype(np.float32)
    if last == "signs":
        return mx.array(np.sign(noise))
    if last in ("scales", "biases"):  # of weights that are packed from the start
        return mx.array((0.1 if last == "scales" else -0.15) + 0.01 * noise)
    if last == "A_log":
        return mx.array(np.log(rng.uniform(0.3, 3.0, like.shape)).astype(np.float32))
    if last == "dt_bias":
        return mx.array(-1 + 0.5 * noise)
    if last == "D":
        return mx.array(1 + 0.2 * noise)
    if like.ndim <= 1:
        is_norm = last == "weight" or "norm" in last
        return mx.array(is_norm + (0.2 if is_norm else 0.05) * noise)
    if "conv" in name and last == "weight" and like.ndim == 3:
        return mx.array(0.6 * noise)
    is_table = re.search("embed|wte|wpe", name) and "per_layer" not in name
    factor = 0.3 if last.endswith("gate_weight") else 1.5  # a gate that is shut has no gradient
    scale = 0.03 if is_table else factor / np.sqrt(like.shape[-1])
    return mx.array(scale * noise)


def _random_integers(rng: np.random.Generator, like: mx.array) -> mx.array:
    """Packed weights; those of bitnet are ternary, four codes of 0 to 2 a byte."""
    if like.dtype == mx.uint32:
        return mx.array(rng.integers(0, 2**32, like.shape, dtype=np.uint32))
    if like.dtype != mx.uint8:
        return like
    codes = rng.integers(0, 3, (4, *like.shape))
    packed = np.sum([codes[i] << (2 * i) for i in range(4)], axis=0)
    return mx.array(packed.astype(np.uint8))
