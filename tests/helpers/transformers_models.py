"""Tiny models of transformers, saved in the keys of both generations of ``config.json``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.converters.reference.verify import relative_error
from mlx_mtp.model.base import open_base

COMMON: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FACTORS = {
    **{"attention_multiplier": 0.3, "embedding_multiplier": 3.0},
    **{"residual_multiplier": 0.7, "logits_scaling": 2.0},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": HEADS,
    "ministral3": HEADS,
    "gemma3_text": HEADS
    | {"query_pre_attn_scalar": 8, "num_hidden_layers": 6, "sliding_window": 6},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 4},
    "granite": FACTORS,
    "qwen3_moe": HEADS | EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True},
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1},
        **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "rope_interleave": True},
    },
    "gemma2": HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 6},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 6},
    "mixtral": {"num_local_experts": 4},
    "glm4": HEADS,
    "seed_oss": HEADS,
    "stablelm": {},
    "cohere": {},
    "ernie4_5": HEADS,
    "helium": HEADS,
    "gemma": HEADS,
    "starcoder2": {},
    "gpt_neox": {"intermediate_size": 128},
    "glm": HEADS,
    "exaone": HEADS | {"num_layers": 2},
    "cohere2": HEADS | {"num_hidden_layers": 4, "sliding_window": 6},
    "phi": {},
    "nemotron": HEADS,
}
PROMPT = [(7 * i + 3) % 61 for i in range(40)]  # longer than the windows


def build(kind: str, folder: Path, **settings: Any) -> np.ndarray:
    """Save a random model as transformers does; return its logits ``[L, V]`` after ``PROMPT``.

    Raises:
        Exception: of any kind, if transformers does not accept the settings.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **{**COMMON, **ARCHITECTURES[kind], **settings})
    return _save(config, folder)


def build_published(config: dict[str, Any], folder: Path) -> np.ndarray:
    """Save a random model with a ``config.json`` as it was published; return logits as above."""
    from transformers import AutoConfig

    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    logits = _save(AutoConfig.from_pretrained(folder, dtype="float32"), folder)
    path.rename(folder / "resaved.json")  # of transformers 5
    path.write_text(json.dumps(config))
    return logits


def _save(config: Any, folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    loader: Any = AutoModelForCausalLM
    model = loader.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
            else:
                value.normal_(0, 0.5 if "embed" in name else 1.2 / value.shape[-1] ** 0.5)
        model.tie_weights()
        model.save_pretrained(folder)
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()


def rewrite_in_older_keys(folder: Path) -> None:
    """Rewrite a ``config.json`` as transformers 4 had it."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": config.pop("dtype", None), "transformers_version": "4.48.0"}
    rope = config.pop("rope_parameters", None) or {}
    full = dict(rope.get("full_attention") or rope)
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if config["model_type"] in ("ministral3", "olmo3"):  # these had no older keys
        config["rope_parameters"] = rope
    elif config["model_type"] == "gpt_neox":
        config["rotary_emb_base"] = full.pop("rope_theta")
        config["rotary_pct"] = full.pop("partial_rotary_factor")
        config["rope_scaling"] = full if full["rope_type"] != "default" else None
    elif full:
        config["rope_theta"] = full.pop("rope_theta")
        if "partial_rotary_factor" in full:
            config["partial_rotary_factor"] = full.pop("partial_rotary_factor")
        kind = full.pop("rope_type")
        key = "rope_type" if config["model_type"] == "gemma3_text" else "type"
        config["rope_scaling"] = None if kind == "default" else {key: kind, **full}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))


def error_of_logits(folder: Path, expected: np.ndarray) -> float:
    """Return the largest relative error of MLX's logits for a folder."""
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        base: Any = open_base(folder)[0]
        return relative_error(np.array(base(mx.array([PROMPT]))[0]), expected)
    finally:
        mx.set_default_device(device)


@cache
def is_available() -> bool:
    """Return whether the extra ``convert`` is installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True
