"""The state-dict layout of the PyTorch side of a verification: bare tensors, hooked on by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mlx_mtp.converters.reference.files import Original
from mlx_mtp.converters.reference.reference import Adapter, Gate

if TYPE_CHECKING:
    import numpy as np
    import torch

Sampler = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
_LORA = re.compile(r"(.+)\.lora_([ab])(?:\.default)?(?:\.weight)?", re.IGNORECASE)


def attach_state_dict(
    model: Any,
    original: Original,
    *,
    gate: Gate,
    options: Mapping[str, str],
    written: np.ndarray | None,
) -> Adapter:
    """Hook every pair of low-rank tensors on; find mask rows and sampler by name and shape.

    Raises:
        ValueError: a tensor fits no layer, or the scale or the mask rows cannot be found.
    """
    from mlx_mtp.converters.reference.adapters import add_low_rank, look_up

    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in original.tensors.items():
        if match := _LORA.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2].lower()] = value.float()
    layers = {path: module for path, module in model.named_modules() if _is_linear(module)}
    for path, pair in pairs.items():
        layer = layers[_layer_path(path, layers)]
        a, b = _oriented(path, pair, layer)
        scale = _scale(original, options, path=path, rank=a.shape[0])
        add_low_rank(layer, a, b, scale=scale, gate=gate, columns=slice(None))
    if "seed" in options:
        ids = ",".join(map(str, look_up(model, written)))
        options = {**options, "mask_token_ids": ids}
    return Adapter(
        mask_rows=_mask_rows(model, original, options),
        sampler=_sampler(model, original, options),
    )


def _is_linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _layer_path(path: str, layers: Mapping[str, Any]) -> str:
    """The layer that a tensor's path ends in, whatever prefixes a project put before it."""
    parts = path.replace("_orig_mod.", "").split(".")
    for start in range(len(parts)):
        for prefix in ("", "model."):
            if (found := prefix + ".".join(parts[start:])) in layers:
                return found
    raise ValueError(f"{path} is no linear layer of the base model")


def _oriented(
    path: str, pair: Mapping[str, torch.Tensor], layer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as ``[r, in]`` and ``[out, r]``."""
    a, b = pair.get("a"), pair.get("b")
    if a is None or b is None:
        raise ValueError(f"{path} has one low-rank tensor of two")
    given = tuple(a.shape), tuple(b.shape)
    a = a if a.shape[1] == layer.in_features else a.T
    b = b if b.shape[0] == layer.out_features else b.T
    fits = a.shape[1] == layer.in_features and b.shape[0] == layer.out_features
    if not fits or a.shape[0] != b.shape[1]:
        raise ValueError(f"{path}: low-rank tensors {given} do not fit the base model's layer")
    return a, b


def _scale(original: Original, options: Mapping[str, str], *, path: str, rank: int) -> float:
    """Factor of a low-rank product, from the options or the values saved beside it."""
    if "scale" in options:
        return float(options["scale"])
    rooted = _value(original, ("use_rslora", "rslora", "lora_use_rslora"))
    alpha = float(options["alpha"]) if "alpha" in options else _own(original, path, "alpha")
    if alpha is not None:
        return alpha / (math.sqrt(rank) if rooted else rank)
    scale = _own(original, path, "scale") or _own(original, path, "scaling")
    if scale is not None:
        return scale
    alpha = _value(original, ("lora_alpha", "alpha"))
    scale = _value(original, ("scaling", "scale", "lora_scale", "lora_scaling"))
    if alpha is None and scale is None:
        raise ValueError("the checkpoint does not say its alpha; give alpha")
    if scale is not None and (alpha is None or rooted is None):
        return scale
    assert alpha is not None
    return alpha / (math.sqrt(rank) if rooted else rank)


def _own(original: Original, path: str, word: str) -> float | None:
    """A number that lies beside one layer's low-rank tensors."""
    names = (f"{path}.{word}", f"{path}.lora_{word}")
    found = [original.tensors[name] for name in names if name in original.tensors]
    return float(found[0]) if found else None


def _value(original: Original, names: tuple[str, ...]) -> float | None:
    """A number saved under one of these names, in a PyTorch file or a JSON file."""
    found = dict(original.values)
    for content in original.configs.values():
        if "model_type" not in content:  # else it is the base model's
            found |= content
            for inner in content.values():
                found |= inner if isinstance(inner, dict) else {}
    for wanted in names:
        for name, value in found.items():
            if name.rpartition(".")[-1] == wanted and isinstance(value, int | float):
                return float(value)
    return None


def _mask_rows(model: Any, original: Original, options: Mapping[str, str]) -> torch.Tensor:
    """A tensor named after masks, the new rows of an embedding table, or tokens of the base."""
    import torch

    table = model.get_input_embeddings()
    num_rows, width = table.weight.shape
    tensors = original.tensors
    if "masks" in options:
        return _repeated(tensors[options["masks"]], width, options)
    named = [value for name, value in tensors.items() if "mask" in name.lower()]
    named = [value for value in named if value.is_floating_point()]
    if len(named) == 1:
        return _repeated(named[0], width, options)
    saved = [value for name, value in tensors.items() if name.endswith("embed_tokens.weight")]
    ids = [int(part) for part in options.get("mask_token_ids", "").split(",") if part]
    if saved and (ids or saved[0].shape[0] > num_rows):
        return saved[0].float()[ids or slice(num_rows, None)]
    if ids:
        with torch.no_grad():
            return table(torch.tensor(ids))
    raise ValueError("the checkpoint's mask rows cannot be found; give masks or mask_token_ids")


def _repeated(rows: torch.Tensor, width: int, options: Mapping[str, str]) -> torch.Tensor:
    """Rows ``[k, D]``; one shared row k times."""
    rows = rows.float().reshape(-1, width)
    k = int(options.get("num_draft_tokens", rows.shape[0]))
    return rows.expand(k, -1) if rows.shape[0] == 1 else rows[:k]


def _sampler(model: Any, original: Original, options: Mapping[str, str]) -> Sampler | None:
    """Two blocks of linear layer, SiLU and norm, in the order of their names."""
    import torch
    from torch.nn.functional import linear, silu

    groups = _sampler_groups(original.tensors)
    if not groups:
        return None
    linears = [group for group in groups if group["weight"].ndim == 2]
    norms = [_norm(group, model, options) for group in groups if group["weight"].ndim == 1]
    if len(linears) != 2 or len(norms) != 2:
        raise ValueError(f"the sampler has {len(linears)} linear layers and {len(norms)} norms")
    order = -1 if options.get("concat") == "hidden-embedding" else 1
    residual = options.get("residual", "none")

    def sampler(previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = torch.cat([previous, hidden][::order], dim=-1)
        inner = norms[0](silu(linear(x, linears[0]["weight"], linears[0].get("bias"))))
        out = norms[1](silu(linear(inner, linears[1]["weight"], linears[1].get("bias"))))
        return out + {"hidden": hidden, "inner": inner}.get(residual, torch.zeros(()))

    return sampler


def _sampler_groups(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Weights and biases of the sampler's layers, layers in the order of their names."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        if "sampler" in path and leaf in ("weight", "bias"):
            groups.setdefault(path, {})[leaf] = value.float()

    def natural(path: str) -> list[Any]:
        return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", path)]

    return [groups[path] for path in sorted(groups, key=natural)]


def _norm(
    group: Mapping[str, torch.Tensor], model: Any, options: Mapping[str, str]
) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn.functional import layer_norm, rms_norm

    weight, bias = group["weight"], group.get("bias")
    kind = options.get("norm", "rms" if bias is None else "layer")
    default = 1e-5 if kind == "layer" else float(getattr(model.config, "rms_norm_eps", 1e-6))
    eps = float(options.get("norm_eps", default))
    if kind == "layer":
        return lambda x: layer_norm(x, weight.shape, weight, bias, eps)
    return lambda x: rms_norm(x, weight.shape, weight, eps)
