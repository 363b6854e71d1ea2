"""Architectures that mlx-lm has under another name.

``sdar`` is Qwen3 for causal decoding: its mask for diffusion in blocks is for training (Uno's
bundles, arXiv 2609.04010).  A dense ``k2_horizon`` is Llama, whose RMSNorms may work on groups of
features; vLLM's ``k2_horizon`` is the reference.  Neither needs the code in its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OTHER_NAMES = {"sdar": "qwen3", "k2_horizon": "llama"}
_CODE = ("auto_map", "architectures")  # they name classes of the folder's own code
_UNUSED = ("use_sliding_window", "sliding_window", "max_window_layers")
# What some models of the type have, and others lack.
_BEYOND_LLAMA = (
    *("num_experts", "mova_num_experts", "query_key_norm", "attention_gate_func"),
    "use_sliding_window",
)
_GROUPS = "layernorm_num_groups"


def as_known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` under the name that mlx-lm has for its architecture.

    Raises:
        ValueError: the model is another variant than the one that mlx-lm has.
    """
    kind = config.get("model_type")
    if kind not in _OTHER_NAMES:
        return dict(config)
    values = without_code(config)
    if kind == "k2_horizon":
        for key in _BEYOND_LLAMA:
            if config.get(key):
                raise ValueError(
                    f"config.json: {key} is {config[key]!r}, but only dense k2_horizon models "
                    "without it are supported"
                )
        if config.get("rope_head_dim") not in (None, config.get("head_dim")):
            raise ValueError("config.json: rope_head_dim differs from head_dim")
        values = {key: value for key, value in values.items() if key not in _UNUSED}
    return {**values, "model_type": _OTHER_NAMES[kind]}


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` without the names of classes in the folder's own code."""
    return {key: value for key, value in config.items() if key not in _CODE}


def norm_groups(config: Mapping[str, Any]) -> int:
    """Number of groups of features that each RMSNorm of a model normalises on their own."""
    return (config.get(_GROUPS) or 1) if config.get("model_type") == "k2_horizon" else 1
