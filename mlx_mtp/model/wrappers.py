"""The one way in which a model is changed: a module is wrapped, and ``replace`` puts it in place.

``Wrapper`` is the base of modules that compute differently with the parameters and sub-modules of
the module that they wrap.  Some wrappers here consult the layout of the forward in progress
(``StepScope``); the last five apply settings that mlx-lm's class does not (``base``).
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_attention_mask

from mlx_mtp.model.layout import StepScope


def replace(base: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace sub-modules in place.

    Args:
        base: the model.
        modules: the new modules by path, such as ``model.layers.0.mlp``.

    Raises:
        ValueError: there is no module at a path.
    """
    base.update_modules(tree_unflatten(list(modules.items())))


class Wrapper(nn.Module):
    """A module that computes with the parameters and sub-modules of another one.

    These are shared under their own names, so parameters keep their paths; whatever is set later
    is set in both modules.  Other attributes are looked up in the wrapped module.

    Attributes:
        wrapped: the other module; not listed among the sub-modules.
    """

    wrapped: Any

    def __init__(self, wrapped: nn.Module) -> None:
        nn.Module.__init__(self)  # not that of a further base class, which would make parameters
        dict.update(self, wrapped)
        object.__setattr__(self, "wrapped", wrapped)
        self._no_grad = wrapped._no_grad

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a parameter or sub-module here and in the wrapped module."""
        super().__setitem__(key, value)
        self.wrapped[key] = value

    def __getattr__(self, name: str) -> Any:
        """Look up a parameter, a sub-module or an attribute of the wrapped module."""
        value = self.get(name)
        if value is not None:
            return value
        if "wrapped" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        return getattr(self.wrapped, name)


class Rebound(Wrapper):
    """A module that runs its own code with other values for some of its global names.

    mlx-lm's modules call functions of their own file by a global name and take no others as an
    argument.  Rebinding the name in mlx-lm would change every model in the process, so the code is
    run with a namespace in which it is bound anew.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, Any]) -> None:
        super().__init__(module)
        call = own_call(module)
        self._call = types.FunctionType(
            call.__code__,
            {**call.__globals__, **names},
            call.__name__,
            call.__defaults__,
            call.__closure__,
        )
        self._call.__kwdefaults__ = call.__kwdefaults__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code."""
        return self._call(self.wrapped, *args, **kwargs)


def own_call(module: nn.Module) -> Any:
    """Return the function with a module's own code, which takes the module and its arguments."""
    return module._call if isinstance(module, Rebound) else type(module).__call__


class HiddenStates(Wrapper):
    """A backbone that returns given hidden states, so that a model computes its head alone."""

    def head(self, model: Any, hidden: mx.array) -> mx.array:
        """Turn hidden states ``[B, L, D]`` into logits by calling a model with this backbone."""
        object.__setattr__(self, "_hidden", hidden)
        try:
            return model(mx.zeros(hidden.shape[:2], mx.int32))
        finally:
            object.__setattr__(self, "_hidden", None)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Return the hidden states."""
        del args, kwargs
        return self._hidden


class WithoutHead(Wrapper):
    """A backbone whose own code ends in the output head: it returns hidden states instead.

    Args:
        backbone: the module.
        head: name of its linear head, or of its embedding if that is the head.
    """

    def __init__(self, backbone: nn.Module, head: str) -> None:
        super().__init__(backbone)
        self._head = head

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute; the head and the limit of the logits have no effect."""
        if name == "final_logit_softcapping":
            return None
        value = super().__getattr__(name)
        return _Headless(value) if name == self.__dict__.get("_head") else value

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Return hidden states ``[B, L, D]``."""
        out: Any = type(self.wrapped).__call__(self, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out  # olmo returns its caches too

    def logits(self, hidden: mx.array, head: Any = None) -> mx.array:
        """Turn hidden states ``[B, L, D]`` into logits ``[B, L, V]``, or those of another head."""
        head = self.wrapped[self._head] if head is None else head
        out = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
        limit = getattr(self.wrapped, "final_logit_softcapping", None)
        if limit is None:
            return out
        return sys.modules[type(self.wrapped).__module__].logit_softcap(limit, out)


class _Headless:
    """An output head that returns its input; an embedding still looks up its rows."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(self, x: mx.array) -> mx.array:
        return self._head(x) if hasattr(self._head, "as_linear") else x

    def as_linear(self, x: mx.array) -> mx.array:
        return x


class MaskEmbedding(nn.Module):
    """Token embedding for ordinary rows, learned mask embeddings for mask rows."""

    def __init__(self, embedding: Any, mask_embeddings: mx.array, *, scope: StepScope):
        super().__init__()
        self.embedding = embedding
        self.mask_embeddings = mask_embeddings
        self._scope = scope

    def __call__(self, ids: mx.array) -> mx.array:
        """Map ids ``[B, L]`` to ``[B, L, D]``; ids of mask rows count mask tokens from 0."""
        layout = self._scope.layout
        if layout is None or layout.num_masks == 0:
            return self.embedding(ids)
        split = layout.gate_split
        if split == 0:  # a training forward has mask rows only
            return self.mask_embeddings[ids]
        ordinary = self.embedding(ids[:, :split])
        masks = self.mask_embeddings[ids[:, split:]].astype(ordinary.dtype)
        return mx.concatenate([ordinary, masks], axis=1)

    @property
    def weight(self) -> mx.array:
        """The embedding table."""
        return self.embedding.weight

    def as_linear(self, x: mx.array) -> mx.array:
        """Use the embedding table as the unembedding, ``[..., D]`` to ``[..., V]``."""
        return self.embedding.as_linear(x)


class StepConv(Wrapper):
    """The short convolution of a recurrent layer, whose rows the layer's cache puts in order."""

    def __init__(self, conv: nn.Module, *, scope: StepScope):
        super().__init__(conv)
        self._scope = scope

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve ``[B, K - 1 + L, C]``, the last inputs and the rows, to ``[B, L, C]``."""
        mixer = self._scope.mixer
        return self.wrapped(x) if mixer is None else mixer.convolve(self.wrapped, x)


class LimitedRope(nn.Module):
    """A rotary embedding that would change all earlier rows once a context exceeds a limit.

    Keys in a cache cannot be rotated again, so a context that is decoded stays within the limit
    (``max_context``).  A longer sequence is rotated as transformers does if it comes as a whole.
    """

    def __init__(self, within: nn.Module, beyond: nn.Module, *, limit: int) -> None:
        super().__init__()
        self.within = within
        self.beyond = beyond
        self.limit = limit

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate ``[B, H, L, Dh]`` from position ``offset``."""
        whole = isinstance(offset, int) and offset == 0 and x.shape[-2] > self.limit
        rope: Any = self.beyond if whole else self.within
        return rope(x, offset=offset)


class ExactlyScaled(Wrapper):
    """The backbone of a Gemma 3, whose embeddings in float32 are scaled by an exact factor.

    mlx-lm rounds sqrt(D) to bfloat16, which is right for bfloat16 only: transformers rounds it to
    the type of the weights.
    """

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Call the backbone."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if h.dtype == mx.float32:
            factor = self.args.hidden_size**0.5
            h = h * (factor / mx.array(factor, mx.bfloat16).astype(mx.float32))
        return self.wrapped(inputs, cache, h)


class Activated(Wrapper):
    """An MLP with another activation than its mlx-lm class applies."""

    _NAMES = (("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))

    def __init__(self, mlp: nn.Module, activation: Callable[[mx.array], mx.array]) -> None:
        super().__init__(mlp)
        self._activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[B, L, D]`` to ``[B, L, D]``."""
        if "gate_proj" in self:
            return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))
        first, second = next(names for names in self._NAMES if names[0] in self)
        return self[second](self._activation(self[first](x)))


class GroupedNorm(Wrapper):
    """An RMSNorm that divides each of several groups of neighbouring features by its own root."""

    def __init__(self, norm: nn.Module, groups: int) -> None:
        super().__init__(norm)
        self.groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise ``[..., D]``."""
        groups = x.reshape(*x.shape[:-1], self.groups, -1)
        return mx.fast.rms_norm(groups, None, self.eps).reshape(x.shape) * self.weight


class WindowLayer(Wrapper):
    """A layer whose rows see the last ``window`` rows only, which its mlx-lm class does not do."""

    def __init__(self, layer: nn.Module, window: int) -> None:
        super().__init__(layer)
        self.window = window
        self._signature = inspect.signature(type(layer).__call__)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Call the layer with a mask of its own."""
        call = self._signature.bind(self.wrapped, x, *args, **kwargs)
        cache = call.arguments.get("cache")
        mask = create_attention_mask(x, cache, window_size=self.window, return_array=True)
        call.arguments["mask"] = mask
        return self.wrapped(*call.args[1:], **call.kwargs)
