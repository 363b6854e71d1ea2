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

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from mlx_mtp.model.caches.layers import LayerCache, WindowLayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.native.layers import decoder_layer
from mlx_mtp.model.native.names import Family, family_of, module_indices
from mlx_mtp.model.one_row import is_latent_attention
from mlx_mtp.model.parts import embedding_dims, find_parts, module_at, text_model, with_module
from mlx_mtp.model.wrappers import HiddenStates

_SHARED = ("embedding_norm", "hidden_norm", "projection", "norm")  # by modules that lack them

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)  # of mx.quantize
_MODES = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}  # without biases


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

    def read(
        self,
        hidden: mx.array,
        ids: mx.array,
        *,
        cache: MTPCache,
        last: Sequence[mx.array] = (),
    ) -> list[mx.array]:
        """Run all modules over the rows of a text, as far as its ids are known.

        Module k continues from the states of module k - 1 and is k rows behind the first: its row i
        needs the id of position i + 1 + k.

        Args:
            hidden: the model's states of the rows, ``[1, L, D]``.
            ids: the ids that follow them, ``[1, L]``.
            cache: from ``make_cache``.
            last: what this returned for the rows before; nothing at the beginning.

        Returns:
            The states ``[1, 1, D]`` of each module's last row; none of modules without a row yet.
        """
        done: list[mx.array] = []
        for index in range(self.num_modules):
            if hidden.shape[1] == 0:
                break
            states = self(hidden, ids, cache=cache, index=index)
            done.append(states[:, -1:])
            if index < len(last):
                hidden = mx.concatenate([last[index], states[:, :-1]], axis=1)
            else:
                hidden, ids = states[:, :-1], ids[:, 1:]
        return done

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
    in_layer = [name.removeprefix("layer.") for name in names if name.startswith("layer.")]
    bare = [name for name in in_layer if not name.endswith((".scales", ".biases"))]
    layer, window = decoder_layer(base, config, index, bare)
    own = Predictor(dims, eps, layer, bias="projection.bias" in names, window=window)
    if "norm.weight" in names:
        own.norm = nn.RMSNorm(dims, eps)
    if "head.weight" in names:
        own.head = nn.Linear(dims, table.weight.shape[0], bias=False)
    if "embedding.weight" in names:
        own.embedding = nn.Embedding(table.weight.shape[0], dims)
    return own


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
    if weight is None:
        raise ValueError(f"native modules: the tensor {stem}weight is missing")
    width = layer.weight.shape[-1]
    bits, group_size = weight.shape[-1] * 32 // width, width // scales.shape[-1]
    mode = "affine" if stem + "biases" in tensors else _MODES.get((bits, group_size))
    if mode is None or bits not in _BITS or group_size not in _GROUPS:
        shapes = f"{tuple(weight.shape)} and {tuple(scales.shape)}"
        raise ValueError(
            f"native modules: {stem}weight and its scales have the shapes {shapes}, which are "
            f"those of no quantisation of {width} columns"
        )
    return {"bits": bits, "group_size": group_size, "mode": mode}
