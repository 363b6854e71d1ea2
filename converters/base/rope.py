"""Rotary embedding settings as mlx-lm reads them.

transformers 5 writes ``rope_parameters`` where older versions wrote ``rope_theta``,
``rope_scaling`` and their like.  Most of mlx-lm's models only know the older keys, and use
defaults if these are missing: such a model would load but compute wrong values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older keys for the settings in ``rope_parameters``.

    Args:
        config: a model's ``config.json``, in which older keys take precedence.

    Returns:
        The keys to add; a ``text_config`` is returned whole.
    """
    added = {key: value for key, value in _translated(config) if config.get(key) is None}
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and (changes := older_rope_keys(inner)):
        added["text_config"] = {**inner, **changes}
    return added


def _translated(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return []
    if isinstance(full := rope.get("full_attention"), Mapping):  # settings by layer type
        local = rope.get("sliding_attention")
        theta = local.get("rope_theta") if isinstance(local, Mapping) else None
        return _one_kind(full) + ([] if theta is None else [("rope_local_base_freq", theta)])
    return _one_kind(rope)


def _one_kind(rope: Mapping[str, Any]) -> list[tuple[str, Any]]:
    plain = ("rope_theta", "partial_rotary_factor")
    keys = [(key, rope[key]) for key in plain if rope.get(key) is not None]
    if rope.get("rope_type", "default") != "default":
        keys.append(("rope_scaling", {k: v for k, v in rope.items() if k not in plain}))
    return keys
