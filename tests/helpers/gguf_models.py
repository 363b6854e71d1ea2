"""Tiny GGUF files, written as llama.cpp's converter writes them from PyTorch models.

The names and layouts here are written anew from llama.cpp's rules, not from the code under test.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_SANDWICHED = _NAMES | {  # norms after attention and MLP too
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GLM = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    **{name: f"nextn.{name}" for name in ("eh_proj", "enorm", "hnorm", "embed_tokens")},
    **{f"shared_head.{part}": f"nextn.shared_head_{part}" for part in ("norm", "head")},
    "exp_probs_b": "exp_probs_b",
}
_ARCHITECTURES = {
    **{"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"},
    **{"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "glm4_moe": "glm4moe"},
}
_NUMPY = {np.int32: GGUFValueType.INT32, np.uint8: GGUFValueType.UINT8}
_PERMUTED = ("llama", "granite", "smollm3")
_GEMMA = ("gemma2", "gemma3")

Choose = Callable[[str, np.ndarray], Type]


def write_gguf(
    folder: Path,
    path: Path,
    *,
    choose: Choose | None = None,
    changed: Mapping[str, Any] | None = None,
    prepare: Callable[[GGUFWriter], None] | None = None,
    squeeze: bool = False,
    left_out: str = "",
) -> Path:
    """Write a transformers folder as a GGUF file.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        path: the file.
        choose: type of each tensor by GGUF name and values; float32 by default.
        changed: keys of the architecture to write with other values; None leaves one out.
        squeeze: write matrices of one row as vectors, as older converters did.
        left_out: how the names of tensors begin that are not written.
        prepare: called with the writer at the end, for more keys or tensors.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder)
    arch = str(_ARCHITECTURES.get(config.model_type, config.model_type))
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    keys = _keys(config, arch) | dict(changed or {})
    for key, value in keys.items():
        if value is not None:
            add_key(writer, f"{arch}.{key}", value)
    add_vocabulary(writer, config.vocab_size)
    for name, value in tensors(folder, config, arch).items():
        if left_out and name.startswith(left_out):
            continue
        value = value[0] if squeeze and value.shape[0] == 1 else value
        kind = Type.F32 if choose is None or value.ndim == 1 else choose(name, value)
        add_tensor(writer, name, value, kind)
    if prepare is not None:
        prepare(writer)
    finish(writer)
    return path


def add_tensor(writer: GGUFWriter, name: str, value: np.ndarray, kind: Type) -> None:
    """Add a tensor, quantised if its type is."""
    if kind in (Type.F32, Type.F16):
        writer.add_tensor(name, value.astype(np.float32 if kind == Type.F32 else np.float16))
    else:
        writer.add_tensor(name, quantize(value.astype(np.float32), kind), raw_dtype=kind)


def finish(writer: GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Add a byte-level vocabulary: three special tokens, then symbols of bytes."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", "AB", *symbols][:size]
    tokens += [f"<extra_{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def tensors(folder: Path, config: Any, arch: str) -> dict[str, np.ndarray]:
    """Return a model's tensors as llama.cpp has them, float32."""
    from safetensors.torch import load_file

    state = {
        name: value.float().numpy()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    names = _SANDWICHED if arch in (*_GEMMA, "olmo2") else _GLM if arch == "glm4moe" else _NAMES
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found: dict[str, np.ndarray] = {}
    for name, value in _stacked(state).items():
        name = name.replace("mlp.gate.e_score_correction_bias", "exp_probs_b.bias")
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert match is not None, name
        theirs = match[2] if match[2].endswith("_exps") else names[match[2]]
        if arch in _PERMUTED and theirs in heads:
            value = _permuted(value, heads[theirs])
        if arch in _GEMMA and theirs.endswith("_norm"):
            value = value + np.float32(1)
        layer = "" if match[1] is None else f"blk.{match[1]}."
        found[f"{layer}{theirs}.{match[3]}"] = value
    if config.tie_word_embeddings:
        found.pop("output.weight", None)
    return found | _rope_tensors(config)


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the rotary halves, as ``LlamaModel.permute`` of llama.cpp's converter."""
    shape = heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def _stacked(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stack experts, which transformers 5 saves one by one or stacked under other names."""
    found: dict[str, np.ndarray] = {}
    experts: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    parts = {
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
        "w1": "gate",
        "w3": "up",
        "w2": "down",
    }
    for name, value in state.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.)\S+\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            found[name] = value
        else:
            experts.setdefault((match[1], parts[match[3]]), {})[int(match[2])] = value
    for (layer, part), each in experts.items():
        found[f"{layer}ffn_{part}_exps.weight"] = np.stack([each[i] for i in range(len(each))])
    return found


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = (rope[f"{key}factor"] for key in ("low_freq_", "high_freq_", ""))
    length = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dims)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _keys(config: Any, arch: str) -> dict[str, Any]:
    """Return the architecture's keys."""
    rope = config.rope_parameters
    main = rope.get("full_attention", rope)
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(main["rope_theta"]),
    }
    if arch == "starcoder2":
        keys["attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        keys["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if arch in ("llama", "granite", "smollm3"):
        keys |= {"rope.dimension_count": dims, "vocab_size": config.vocab_size}
    if arch in ("gemma2", "gemma3", "qwen3", "qwen3moe") or getattr(config, "head_dim", None):
        keys |= {"attention.key_length": dims, "attention.value_length": dims}
    window = getattr(config, "sliding_window", None)
    if arch == "phi3":
        keys["rope.dimension_count"] = int(main.get("partial_rotary_factor", 1) * dims)
        keys["attention.sliding_window"] = window or 0
        original = main.get("original_max_position_embeddings", config.max_position_embeddings)
        keys["rope.scaling.original_context_length"] = original
        if main["rope_type"] == "longrope":
            ratio = config.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(ratio) / math.log(original))
            keys["rope.scaling.attn_factor"] = factor
    elif window and getattr(config, "use_sliding_window", True):
        keys["attention.sliding_window"] = window
    if main["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": main["rope_type"], "rope.scaling.factor": main["factor"]}
        if "original_max_position_embeddings" in main:
            length = main["original_max_position_embeddings"]
            keys["rope.scaling.original_context_length"] = length
    for theirs, ours in (
        ("expert_count", "num_local_experts"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if (
            isinstance(value := getattr(config, ours, None), int)
            and "moe" in arch + config.model_type + "moe"
        ):
            keys[theirs] = value
    if arch == "glm4moe":
        modules = int(getattr(config, "num_nextn_predict_layers", 0))
        keys |= {
            "block_count": config.num_hidden_layers + modules,
            "nextn_predict_layers": modules,
            "rope.dimension_count": int(main["partial_rotary_factor"] * dims),
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_count": config.n_routed_experts,
            "expert_shared_count": config.n_shared_experts,
            "expert_gating_func": 2,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": bool(config.norm_topk_prob),
        }
    if arch == "granite":
        keys |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    return keys


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key of the usual type for a value; NumPy's numbers have their own types."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.generic):
        writer.add_key_value(key, value.item(), _NUMPY[value.dtype.type])
    else:
        writer.add_array(key, value)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's ``config.json``."""
    return json.loads((folder / "config.json").read_text())
