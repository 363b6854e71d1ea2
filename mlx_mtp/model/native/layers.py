"""The decoder layer of a native module: one of the model's own class, of the right kind."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.model.wrappers import Wrapper

_WINDOWED = "sliding_attention"
_HAS_WINDOW = ("is_sliding_window", "is_sliding")  # attributes of layers
_WINDOWS = ("sliding_window", "sliding_window_size")  # attributes of a configuration
_BY_EXPERTS = {"is_moe_layer": (False, True), "mlp_layer_types": ("dense", "sparse")}


def decoder_layer(
    base: Any, config: Mapping[str, Any], index: int, names: Collection[str]
) -> tuple[nn.Module, int | None]:
    """Make the decoder layer of a module.

    It is the layer that would follow the model's own, if it has the parameters that there are
    tensors for; else a layer like the last of the model's own that has them, or most of them.  So
    the module of a hybrid gets attention, and one of a model with experts gets experts or none.

    Args:
        base: the mlx-lm model.
        config: its ``config.json``.
        index: number of the module.
        names: names of its layer's tensors, those of scales and biases left out.

    Returns:
        The layer, and the number of rows that a row of it sees if it has a window.
    """
    best, least = None, 0
    for each in _candidates(base, config, index, is_sparse=any("switch_mlp" in x for x in names)):
        difference = len(_parameter_names(each[0]) ^ set(names))
        if best is None or difference < least:
            best, least = each, difference
        if not difference:
            break
    assert best is not None
    return best


def _candidates(
    base: Any, config: Mapping[str, Any], index: int, *, is_sparse: bool
) -> Iterator[tuple[nn.Module, int | None]]:
    """Layers that a module may have, the most likely first, and their windows."""
    kind: Any = _layer_class(base)
    options = list(inspect.signature(kind.__init__).parameters)[2:]
    count = len(base.layers)
    args = _with_more_layers(base.args, config, count, count + index + 1, is_sparse=is_sparse)
    window = next((getattr(args, name) for name in _WINDOWS if hasattr(args, name)), None)
    kinds = getattr(args, "layer_types", None) or {}
    for place in (count + index, *reversed(range(count))):
        values = {"is_moe": is_sparse, "is_sliding_window": True}  # of mimo_v2_flash
        layer = kind(args, *(values.get(name, place) for name in options))
        has_window = any(getattr(layer, name, False) for name in _HAS_WINDOW)
        has_window |= bool(kinds) and kinds[place] == _WINDOWED
        yield layer, window if has_window else None


def _layer_class(base: Any) -> type[nn.Module]:
    layer = base.layers[-1]
    while isinstance(layer, Wrapper):
        layer = layer.wrapped
    return type(layer)


def _parameter_names(module: nn.Module) -> set[str]:
    parameters: Any = tree_flatten(module.parameters())
    return {name for name, _ in parameters}


def _with_more_layers(
    args: Any, config: Mapping[str, Any], count: int, needed: int, *, is_sparse: bool
) -> Any:
    """A configuration whose lists by layer reach as far as the layers of modules.

    A configuration may say the modules' kinds (``mtp_layer_types``), or have them at the end of its
    own lists; else they have a window if any layer has one.  What a list lacks is as in the last
    layer of the same kind.
    """
    lists = {
        field.name: list(value)
        for field in dataclasses.fields(args)
        if isinstance(value := getattr(args, field.name), list | tuple) and len(value) >= count
    }
    kinds = lists.get("layer_types", [])
    if kinds:
        kinds[count:] = config.get("mtp_layer_types") or kinds[count:]
        kinds += [_WINDOWED if _WINDOWED in kinds else kinds[-1]] * (needed - len(kinds))
    for name, values in lists.items():
        while len(values) < needed:
            alike = [i for i in range(count) if kinds and kinds[i] == kinds[len(values)]]
            values.append(values[alike[-1] if alike else count - 1])
        if name in _BY_EXPERTS:
            values[count:] = [_BY_EXPERTS[name][is_sparse]] * (len(values) - count)
    return dataclasses.replace(args, **lists) if lists else args
