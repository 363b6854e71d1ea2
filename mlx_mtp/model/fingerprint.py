"""Fingerprints of base models: an adapter fits one function, whatever its quantisation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.parts import text_model
from mlx_mtp.model.wrappers import WindowLayer

# Settings of mlx-lm's ModelArgs that change the function of given weights.  Sizes are left out, as
# the weights imply them, and so are tied heads and vocabularies, which conversions may change.
_SETTINGS = (
    *("rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_traditional", "rope_local_base_freq"),
    *("partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "attention_multiplier", "embedding_multiplier", "logit_scale"),
    *("residual_multiplier", "logits_scaling", "no_rope_layers", "norm_topk_prob"),
    *("num_experts_per_tok", "use_qk_norm", "clip_qkv", "hidden_act", "activation"),
)
_NEUTRAL = {"partial_rotary_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}


def fingerprint(base: Any) -> str:
    """Hash that identifies a base model, whatever its quantisation.

    Normalisation weights are never quantised, differ between trained models and are published in
    bfloat16 or wider, so they are hashed, rounded to bfloat16, with the model type, the names, and
    the settings that change what a model computes.
    """
    base = text_model(base)
    digest = _hash_of_norms(base)
    for name, value in sorted(_settings(base).items()):
        digest.update(f"\n{name}={_canonical(value)}".encode())
    return digest.hexdigest()


def is_fingerprint_of(base: Any, value: Any) -> bool:
    """Return whether a fingerprint is this model's, or its former one, without settings."""
    return value == _hash_of_norms(text_model(base)).hexdigest() or value == fingerprint(base)


def model_args(base: Any) -> Any:
    """Return the settings of an mlx-lm model, which most classes call ``args``, some ``config``."""
    return getattr(base, "args", None) or getattr(base, "config", None)


def _hash_of_norms(base: Any) -> Any:
    digest = hashlib.sha256(base.model_type.encode())
    for name, value in sorted(cast(list[tuple[str, mx.array]], tree_flatten(base.parameters()))):
        if "norm" in name and value.ndim == 1:
            digest.update(name.encode())
            rounded = value.astype(mx.bfloat16).astype(mx.float32)
            digest.update(np.array(rounded).tobytes())
    return digest


def _settings(base: Any) -> dict[str, Any]:
    """Return the settings that differ from neutral ones, so that new keys change no fingerprint."""
    args = vars(model_args(base))
    found = {key: args.get(key) for key in _SETTINGS}
    parameters = args.get("rope_scaling") or args.get("rope_parameters") or {}
    kind = parameters.get("type") or parameters.get("rope_type") or "default"
    scaling = {} if kind == "default" else {"rope_type": kind, **_numbers(parameters)}
    if kind == "dynamic":
        scaling["max_position_embeddings"] = args.get("max_position_embeddings")
    if "llama_4_scaling_beta" in parameters:
        scaling |= _numbers(parameters)
    found |= {f"rope_scaling.{key}": value for key, value in scaling.items()}
    if kind == "yarn" and not parameters.get("truncate", True):
        found["rope_scaling.untruncated"] = True
    found["rope_theta"] = args.get("rope_theta") or parameters.get("rope_theta")
    caches = lm_cache.make_prompt_cache(base)
    layers: dict[int, Any] = dict(enumerate(base.layers))
    windows = [_window(args, layers.get(i), i, cache) for i, cache in enumerate(caches)]
    found["windows"] = windows if any(windows) else None
    return {
        key: value
        for key, value in found.items()
        if value not in (None, False, _NEUTRAL.get(key.rpartition(".")[-1]))
    }


def _numbers(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of rotary scaling that mlx-lm reads."""
    left_out = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor")
    return {
        key: value
        for key, value in parameters.items()
        if key not in left_out and not isinstance(value, str | bool)
    }


def _window(args: Mapping[str, Any], layer: Any, index: int, cache: Any) -> int | None:
    """Return the window of a layer, whoever applies it."""
    if isinstance(layer, WindowLayer):
        return layer.window
    if isinstance(cache, lm_cache.RotatingKVCache):
        return cache.max_size
    kinds = args.get("layer_types") or []
    sliding = index < len(kinds) and kinds[index] == "sliding_attention"
    return args.get("sliding_window") if sliding else None


def _canonical(value: Any) -> str:
    """Write a setting as every library's spelling of it; GGUF files have float32 numbers."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(float(value), ".6g")
    return str(value)
