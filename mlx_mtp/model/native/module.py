"""A model's native modules for multi-token prediction.

One module predicts, from the model's hidden state of position i and the id of position i + 1, the
id of position i + 2 (DeepSeek-V3 report, section 2.2, equations 21 to 23):

    x_i = P [norm(h_i); norm(Emb(t_{i+1}))]     h'_i = norm(Layer(x_{<=i}))     logits = Head(h'_i)

h'_i takes the place of h for the next module, or for the same one again.  Families differ in the
order of the concatenation and in whether states are passed on before a norm (``names``).  Here
states always have the form of the model's own: after its final norm.  Where a family passes them
on before it, that norm's weights are divided out again; its scale does not matter, as the next
thing is a norm.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from mlx_mtp.model.caches.layers import LayerCache, WindowLayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.native.names import Family, family_of, module_indices
from mlx_mtp.model.one_row import is_latent_attention
from mlx_mtp.model.parts import embedding_dims, find_parts, module_at, text_model, with_module
from mlx_mtp.model.wrappers import HiddenStates, Wrapper

_SHARED = ("embedding_norm", "hidden_norm", "projection", "norm")  # by modules that lack them
_SPARSE_LISTS = {"is_moe_layer": (False, True), "mlp_layer_types": ("dense", "sparse")}
_WINDOWED = ("is_sliding_window", "is_sliding", "is_swa")  # attributes of layers
_WINDOWS = ("sliding_window", "sliding_window_size")  # attributes of a configuration


class Predictor(nn.Module):
    """One module: two norms, a projection, a decoder layer and what comes after it.

    Attributes:
        embedding_norm: norm of the embedding.
        hidden_norm: norm of the hidden state.
        projection: ``[2 D, D]``.
        layer: a decoder layer of the model's class.
        norm: norm after it; None for the model's final norm.
        head: a head of its own, or None.
        embedding: a table of its own, or None.
        window: rows that a row of the layer sees; None for all.
    """

    def __init__(
        self, dims: int, eps: float, layer: nn.Module, *, bias: bool, window: int | None
    ) -> None:
        super().__init__()
        self.embedding_norm = nn.RMSNorm(dims, eps)
        self.hidden_norm = nn.RMSNorm(dims, eps)
        self.projection = nn.Linear(2 * dims, dims, bias=bias)
        self.layer = layer
        self.norm: nn.RMSNorm | None = None
        self.head: nn.Linear | None = None
        self.embedding: nn.Embedding | None = None
        self.window = window
        self.needs_array = any(is_latent_attention(module) for module in layer.modules())


class NativeModule(nn.Module):
    """The native modules of a model.

    Parameters of the model, of which only a reference is kept, are not among this one's.

    Attributes:
        predictors: the modules.
    """

    def __init__(self, base: Any, predictors: list[Predictor], family: Family) -> None:
        super().__init__()
        self.predictors = predictors
        self.family = family
        object.__setattr__(self, "_base", base)
        self._parts = find_parts(base)

    @property
    def num_modules(self) -> int:
        """Number of modules; the first is used again after the last."""
        return len(self.predictors)

    def make_cache(self) -> MTPCache:
        """Make fresh caches, one per module.

        Rows are rewound exactly.  ``MTPCache.rewind`` drops rows of every module; if only some of
        the modules ran, rewind ``cache.layers[index]``.
        """
        scope = StepScope()
        return MTPCache(
            [
                LayerCache(KVCache(), scope=scope)
                if predictor.window is None
                else WindowLayerCache(window=predictor.window, scope=scope)
                for predictor in self.predictors
            ]
        )

    def __call__(
        self, hidden: mx.array, ids: mx.array, *, cache: MTPCache, index: int = 0
    ) -> mx.array:
        """Run one module over rows that follow those in its cache.

        Args:
            hidden: ``[1, L, D]``, of positions i: what ``MTPModel`` returned or this has.
            ids: ``[1, L]``, of positions i + 1.
            cache: from ``make_cache``; the rows are appended to the cache of this module.
            index: number of the module; counted on from the first after the last.

        Returns:
            Hidden states ``[1, L, D]``, for ``logits`` and for the next module.
        """
        index %= self.num_modules
        own, layer_cache = self.predictors[index], cache.layers[index]
        embedding = own.embedding or module_at(self._base, self._parts.embedding)
        pair = [own.embedding_norm(embedding(ids)), own.hidden_norm(self._before_norm(hidden))]
        if self.family.hidden_first:
            pair.reverse()
        x = own.projection(mx.concatenate(pair, axis=-1))
        mask = create_attention_mask(
            x, layer_cache, window_size=own.window, return_array=own.needs_array
        )
        layer: Any = own.layer
        x = layer(x, mask, layer_cache)
        if own.norm is not None and not self.family.before_norm:
            return own.norm(x)
        return self._final_norm(x)

    def logits(self, hidden: mx.array, index: int = 0) -> mx.array:
        """Turn what a module returned, ``[1, L, D]``, into logits ``[1, L, V]``."""
        own = self.predictors[index % self.num_modules]
        if own.norm is not None and self.family.before_norm:
            hidden = own.norm(self._before_norm(hidden))
        if own.head is not None:
            return own.head(hidden)
        path = self._parts.backbone
        states = HiddenStates(module_at(self._base, path))
        return states.head(with_module(self._base, path, states), hidden)

    @property
    def _final_norm(self) -> Any:
        return module_at(self._base, self._parts.backbone).norm

    def _before_norm(self, hidden: mx.array) -> mx.array:
        """Undo the weights of the model's final norm, if the family wants it."""
        if not self.family.before_norm:
            return hidden
        weight = self._final_norm.weight
        return mx.where(weight == 0, 0, hidden / weight)


def build_native_module(
    base: Any, tensors: Mapping[str, mx.array], config: Mapping[str, Any]
) -> NativeModule:
    """Build a model's native modules.

    Args:
        base: the mlx-lm model.
        tensors: by canonical name (``published.canonical_tensors``).  What has ``.scales`` is
            quantised; bits, group size and mode follow from the shapes and types.
        config: the model's ``config.json``.

    Raises:
        ValueError: the family is not supported, or a tensor is missing, unknown or of another
            shape; one line.
    """
    base, family = text_model(base), family_of(config)
    if family is None:
        raise ValueError(f"native modules of {base.model_type} models are not supported")
    indices = module_indices(tensors)
    if not indices or indices != list(range(len(indices))):
        raise ValueError(f"native modules: expected numbers from 0, got {indices}")
    complete = dict(tensors)
    for name in [name for name in tensors if name.startswith("0.")]:
        part = name.split(".")[1]
        for index in indices[1:]:
            if part in _SHARED and not any(x.startswith(f"{index}.{part}.") for x in tensors):
                complete[f"{index}.{name.removeprefix('0.')}"] = tensors[name]
    predictors = [_predictor(base, config, index, complete) for index in indices]
    native = NativeModule(base, predictors, family)
    _load(native, base, complete)
    native.eval()
    return native


def _predictor(
    base: Any, config: Mapping[str, Any], index: int, tensors: Mapping[str, mx.array]
) -> Predictor:
    """Make a module with the parts that there are tensors for."""
    prefix = f"{index}."
    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    parts = find_parts(base)
    table = module_at(base, parts.embedding)
    dims, eps = embedding_dims(table), module_at(base, parts.backbone).norm.eps
    layer, window = _layer(base, config, index, names)
    own = Predictor(dims, eps, layer, bias="projection.bias" in names, window=window)
    if "norm.weight" in names:
        own.norm = nn.RMSNorm(dims, eps)
    if "head.weight" in names:
        own.head = nn.Linear(dims, table.weight.shape[0], bias=False)
    if "embedding.weight" in names:
        own.embedding = nn.Embedding(table.weight.shape[0], dims)
    return own


def _layer(
    base: Any, config: Mapping[str, Any], index: int, names: set[str]
) -> tuple[nn.Module, int | None]:
    """Make a decoder layer of the model's class, of the kind that has these tensors.

    The layers that could follow the model's own are tried, then those that it has, from the last.

    Returns:
        The layer, and the number of rows that a row of it sees if it has a window.
    """
    wanted = {name.removeprefix("layer.") for name in names if name.startswith("layer.")}
    wanted = {name for name in wanted if not name.endswith((".scales", ".biases"))}
    candidates = list(_candidates(base, config, index, is_sparse=_is_sparse(wanted)))
    fitting = [each for each in candidates if wanted == _parameter_names(each[0])]
    layer, args = (fitting or candidates)[0]
    has_window = any(getattr(layer, name, False) for name in _WINDOWED)
    window = next((getattr(args, name) for name in _WINDOWS if hasattr(args, name)), None)
    return layer, window if has_window else None


def _parameter_names(module: nn.Module) -> set[str]:
    parameters: Any = tree_flatten(module.parameters())
    return {name for name, _ in parameters}


def _is_sparse(names: set[str]) -> bool:
    return any(".switch_mlp." in name for name in names)


def _candidates(
    base: Any, config: Mapping[str, Any], index: int, *, is_sparse: bool
) -> Iterator[tuple[nn.Module, Any]]:
    """Layers of the model's class that a module may have, the most likely first."""
    kind: Any = _layer_class(base)
    count = len(base.layers)
    options = list(inspect.signature(kind.__init__).parameters)[2:]
    args = _with_more_layers(base.args, config, count, count + index + 1, is_sparse=is_sparse)
    for layer_index in (count + index, *reversed(range(count))):
        values = {"is_moe": is_sparse, "is_sliding_window": True}  # of mimo_v2_flash
        yield kind(args, *(values.get(name, layer_index) for name in options)), args


def _layer_class(base: Any) -> type[nn.Module]:
    layer = base.layers[-1]
    while isinstance(layer, Wrapper):
        layer = layer.wrapped
    return type(layer)


def _with_more_layers(
    args: Any, config: Mapping[str, Any], count: int, needed: int, *, is_sparse: bool
) -> Any:
    """A configuration whose lists by layer reach as far as the layers of modules.

    A configuration may say the modules' kinds (``mtp_layer_types``), or have them at the end of its
    own lists; else they have a window if any layer has one.
    """
    lists = {
        field.name: list(value)
        for field in dataclasses.fields(args)
        if isinstance(value := getattr(args, field.name), list | tuple) and len(value) >= count
    }
    kinds = lists.get("layer_types")
    if kinds is not None:
        kinds[count:] = config.get("mtp_layer_types") or kinds[count:]
        usual = "sliding_attention" if "sliding_attention" in kinds else kinds[-1]
        kinds += [usual] * (needed - len(kinds))
    for name, values in lists.items():
        while len(values) < needed:
            same = [i for i in range(count) if kinds is None or kinds[i] == kinds[len(values)]]
            values.append(values[same[-1] if same else count - 1])
        if name in _SPARSE_LISTS:
            values[count:] = [_SPARSE_LISTS[name][is_sparse]] * (len(values) - count)
    return dataclasses.replace(args, **lists) if lists else args


def _load(native: NativeModule, base: Any, tensors: Mapping[str, mx.array]) -> None:
    """Quantise the layers whose tensors are, and set all parameters."""
    modules = dict(native.named_modules())
    scales = [name for name in tensors if name.endswith(".scales")]
    quantised = {}
    for name in scales:
        path = f"predictors.{name.removesuffix('.scales')}"
        if path in modules:
            quantised[path] = _quantisation(name, tensors, modules[path])
    nn.quantize(native, class_predicate=lambda path, _: quantised.get(path, False))
    parameters: Any = tree_flatten(native.parameters())
    expected = {name.removeprefix("predictors."): value for name, value in parameters}
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"native modules: the tensor {missing[0]} is missing")
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(f"native modules: there is no place for the tensor {unknown[0]}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"native modules: the tensor {name} has the shape {shapes}")
    dtype = module_at(base, find_parts(base).backbone).norm.weight.dtype
    keeps = getattr(base, "cast_predicate", lambda name: True)
    cast = {
        name: value.astype(dtype) if _is_float(value) and keeps(name) else value
        for name, value in tensors.items()
    }
    values = [(f"predictors.{name}", value) for name, value in cast.items()]
    native.update(tree_unflatten(values))


def _is_float(value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating)


def _quantisation(name: str, tensors: Mapping[str, mx.array], layer: Any) -> dict[str, Any]:
    """How a layer is quantised, from the shapes and types of its tensors."""
    stem = name.removesuffix("scales")
    weight, scales = tensors.get(stem + "weight"), tensors[name]
    width = layer.weight.shape[-1]
    if weight is None:
        raise ValueError(f"native modules: the tensor {stem}weight is missing")
    bits, group_size = weight.shape[-1] * 32 // width, width // scales.shape[-1]
    modes = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}
    mode = "affine" if stem + "biases" in tensors else modes.get((bits, group_size), "affine")
    return {"bits": bits, "group_size": group_size, "mode": mode}
