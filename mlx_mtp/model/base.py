"""A base model from its folder: mlx-lm's class, with the settings that ``settings`` reads.

What mlx-lm's class does not compute itself is put in place here: sliding windows, and rotary
scaling that depends on the length of the context.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as lm_utils
from mlx_lm.models import rope_utils

from mlx_mtp.model.aliases import as_known, norm_groups, without_code
from mlx_mtp.model.native.names import belongs_to_modules
from mlx_mtp.model.parts import text_model
from mlx_mtp.model.settings import Rope, Settings, read_settings
from mlx_mtp.model.wrappers import (
    Activated,
    ExactlyScaled,
    GroupedNorm,
    LimitedRope,
    WindowLayer,
    replace,
)
from mlx_mtp.storage.safetensors import check_safetensors
from mlx_mtp.storage.weights import for_mlx_lm, safetensors_files

LOG = logging.getLogger(__name__)
_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
_EMBEDDING = "embed_tokens.weight"
_HEAD = re.compile(r"(^|\.)lm_head\.")


def open_base(
    folder: Path, *, model_config: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the mlx-lm model of a folder lazily: its weights are read when they are first used.

    Args:
        folder: the model's folder.
        model_config: values that replace those of ``config.json``.
        trust_remote_code: whether a ``model_file`` in it may run.

    Returns:
        The model and its configuration, in keys that mlx-lm and transformers read alike.

    Raises:
        ValueError: a file is broken, or a setting cannot be obeyed.
    """
    given = lm_utils.load_config(folder) | (model_config or {})
    config, groups = as_known(given), norm_groups(given)
    is_native = functools.partial(belongs_to_modules, config=config)
    files = safetensors_files(folder, dropped=is_native)
    names = [name for file in files for name in check_safetensors(file)]
    settings = read_settings(config, has_head=any(map(_HEAD.search, names)) if names else None)
    tied = bool(settings.tied and any(map(_HEAD.search, names)))
    if tied:
        LOG.warning("%s: lm_head is not used, because tie_word_embeddings is set", folder)
    renamed = (
        tied
        or _EMBEDDING in names
        or any(_FREQUENCIES.search(name) or is_native(name) for name in names)
    )
    replaced = set(given) - set(settings.config)  # by keys that mlx-lm reads
    try:
        with for_mlx_lm(folder, files) as path:
            model, config = lm_utils.load_model(
                path,
                lazy=True,
                model_config=dict.fromkeys(replaced) | settings.config | settings.overrides,
                get_model_classes=functools.partial(_classes, tied=tied, is_native=is_native)
                if renamed
                else lm_utils._get_classes,
                trust_remote_code=trust_remote_code,
            )
    except ValueError as error:
        if settings.tied and re.search(r"(?s)^Missing .*(lm_head|embed_out)\.", str(error)):
            why = f"but mlx-lm's {settings.config['model_type']} needs an output head"
            raise ValueError(f"config.json: tie_word_embeddings is True, {why}") from None
        raise
    for key in {*replaced, *settings.overrides}:
        config.pop(key)
    _apply(text_model(model), settings)
    if groups > 1:  # written under its own name, because mlx-lm does not compute this
        _group_norms(model, groups)
        return model, without_code(given)
    return model, {**settings.config, **config}


def _classes(
    config: dict[str, Any], *, tied: bool, is_native: Callable[[str], bool]
) -> tuple[type[nn.Module], type]:
    """Return mlx-lm's classes for weights as other libraries name them.

    A tied model may have a head in its files: PyTorch files keep both names of a shared tensor.
    Some classes refuse it as a surplus tensor, and gemma3_text would use it.  Older files have
    frequencies of rotary embeddings, which are no weights.  A model that was saved without its head
    has names without ``model``.  Native MTP modules are no part of mlx-lm's model, though some
    classes leave them among its weights.
    """
    model_class, args_class = lm_utils._get_classes(config)

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = {
            name: value
            for name, value in weights.items()
            if not _FREQUENCIES.search(name) and not (tied and _HEAD.search(name))
        }
        if _EMBEDDING in weights and hasattr(self, "model"):
            weights = {
                name if _HEAD.search(name) else f"model.{name}": value
                for name, value in weights.items()
            }
        inherited = getattr(model_class, "sanitize", None)
        weights = weights if inherited is None else inherited(self, weights)
        return {name: value for name, value in weights.items() if not is_native(name)}

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize}), args_class


def _apply(text: Any, settings: Settings) -> None:
    """Put modules in place for settings that mlx-lm's class does not apply."""
    if text.model_type == "gemma3_text":
        replace(text, {"model": ExactlyScaled(text.model)})
    if settings.activation is not None:
        activation = getattr(nn, settings.activation)
        modules = [(path, x) for path, x in text.named_modules() if path.endswith(".mlp")]
        replace(text, {path: Activated(module, activation) for path, module in modules})
    if settings.rope is not None and settings.rope.partial is not None:
        _rotate_partly(text, settings.rope.partial)
    if settings.rope is not None and settings.rope.scaling is not None:
        _apply_rope(text, settings.rope)
    if settings.windows:
        layers = {
            f"model.layers.{index}": WindowLayer(layer, window)
            for index, (layer, window) in enumerate(
                zip(text.model.layers, settings.windows, strict=True)
            )
            if window is not None
        }
        replace(text, layers)


def _group_norms(model: Any, groups: int) -> None:
    norms = {
        path: GroupedNorm(module, groups)
        for path, module in model.named_modules()
        if isinstance(module, nn.RMSNorm)
    }
    replace(model, norms)


def _rotate_partly(text: Any, share: float) -> None:
    for _, module in text.named_modules():
        if type(module) is nn.RoPE:
            module.dims = int(module.dims * share)


def _apply_rope(text: Any, rope: Rope) -> None:
    modules = dict(text.named_modules())
    assert rope.scaling is not None
    kind = rope.scaling["rope_type"]
    if not rope.applied:
        if kind == "longrope" and any(getattr(x, "traditional", False) for x in modules.values()):
            raise ValueError(
                "config.json: rope_type is 'longrope', which mlx-lm has for no interleaved "
                f"rotary embedding, such as {text.model_type}'s"
            )
        scaled = {
            path: rope_utils.initialize_rope(
                module.dims, rope.theta, module.traditional, rope.scaling, rope.max_positions
            )
            for path, module in modules.items()
            if type(module) is nn.RoPE
        }
        replace(text, scaled)
        modules |= scaled
    if kind == "yarn" and not rope.scaling.get("truncate", True):
        for module in modules.values():
            if isinstance(module, rope_utils.YarnRoPE):
                module._freqs = _untruncated(module.dims, rope)
    if kind == "dynamic":
        replace(
            text,
            {
                path: LimitedRope(
                    nn.RoPE(module.dims, traditional=module.traditional, base=rope.theta),
                    module,
                    limit=rope.max_positions,
                )
                for path, module in modules.items()
                if isinstance(module, rope_utils.DynamicNTKScalingRoPE)
            },
        )
    elif kind == "longrope":
        dims = {
            path: module.dim
            for path, module in modules.items()
            if isinstance(module, rope_utils.SuScaledRoPE)
        }
        replace(text, {path: _long_rope(size, rope) for path, size in dims.items()})
        limit = rope.scaling["original_max_position_embeddings"]
        if rope.scaling["short_factor"] != rope.scaling["long_factor"]:
            text.args.max_position_embeddings = min(limit, rope.max_positions)


def _untruncated(dims: int, rope: Rope) -> mx.array:
    """Return YaRN's wavelengths ``[dims / 2]`` with limits between two dimensions.

    mlx-lm rounds the limits to whole dimensions.
    """
    scaling = rope.scaling
    assert scaling is not None

    def dimension(rotations: float) -> float:
        turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(rope.theta))

    low = max(dimension(scaling.get("beta_fast", 32)), 0)
    high = min(dimension(scaling.get("beta_slow", 1)), dims - 1)
    width = 0.001 if low == high else high - low
    kept = 1 - mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / width, 0, 1)
    plain = rope.theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return plain / (kept + (1 - kept) / scaling["factor"])


def _long_rope(dims: int, rope: Rope) -> LimitedRope:
    """Make a rotary embedding whose factors depend on the length, as transformers' do.

    mlx-lm's has the factors of long contexts at all lengths.
    """
    scaling = rope.scaling
    assert scaling is not None
    limit = scaling["original_max_position_embeddings"]
    attention = scaling.get("attention_factor")
    short, long = (
        rope_utils.SuScaledRoPE(
            dims,
            base=rope.theta,
            max_position_embeddings=scaling["factor"] * limit,
            original_max_position_embeddings=limit,
            long_factor=scaling[key],
            long_mscale=attention,
        )
        for key in ("short_factor", "long_factor")
    )
    return LimitedRope(short, long, limit=limit)
