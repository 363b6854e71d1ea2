"""Where an mlx-lm model keeps the parts that ``MTPModel`` works with.

A vision-language model's language model, which may lack what mlx-lm's own models have, becomes one
that has it (``text_model``).  ``find_parts`` finds the backbone, which turns ids into hidden
states, the embeddings and the head by their place and shape; no family is listed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.lora import linear_dims
from mlx_mtp.model.wrappers import Wrapper

PER_LAYER_TABLE = "embed_tokens_per_layer"
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class Parts:
    """Paths of modules of a model.

    Attributes:
        backbone: the module that turns ids into hidden states ``[B, L, D]``.
        embedding: the token embedding.
        per_layer: the embedding of tokens for each layer (Gemma 3n and 4), if there is one.
        positions: learned embeddings of positions.
        head: the linear layer or the bare weight that makes logits; None for a tied embedding.
        inner_head: name of the backbone's own head, a linear layer or the embedding, if the
            backbone returns logits.
    """

    backbone: str
    embedding: str
    per_layer: str | None
    positions: tuple[str, ...]
    head: str | None
    inner_head: str | None


class TextModel(Wrapper):
    """A language model with what all of mlx-lm's models have and this one's class has not."""

    def __init__(self, language_model: nn.Module, outer: nn.Module) -> None:
        super().__init__(language_model)
        object.__setattr__(self, "_outer", outer)

    @property
    def args(self) -> Any:
        """The configuration."""
        return _args(self.wrapped)

    @property
    def model_type(self) -> str:
        """The type in its configuration, or the outer model's."""
        own = getattr(self.wrapped, "model_type", None)
        return own or getattr(self.args, "model_type", None) or cast(Any, self._outer).model_type

    @property
    def layers(self) -> list[nn.Module]:
        """The layers."""
        owner = self.wrapped if hasattr(self.wrapped, "layers") else self._outer
        return cast(Any, owner).layers

    def make_cache(self) -> list[Any]:
        """Make the caches that mlx-lm makes for the outer model."""
        owner = self.wrapped if hasattr(self.wrapped, "make_cache") else self._outer
        return lm_cache.make_prompt_cache(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the language model."""
        return self.wrapped(*args, **kwargs)


def text_model(base: Any) -> Any:
    """Return the language model of an mlx-lm model; a model without vision is its own."""
    outer = base
    while isinstance(inner := getattr(base, "language_model", None), nn.Module):
        outer, base = base, inner
    if not hasattr(base, "_no_grad"):  # recurrent_gemma's class does not call that of its base
        nn.Module.__init__(base)
    has_all = all(hasattr(base, name) for name in ("args", "model_type", "layers"))
    makes_caches = hasattr(base, "make_cache") or not hasattr(outer, "make_cache")
    return base if has_all and makes_caches else TextModel(base, outer)


def find_parts(base: Any) -> Parts:
    """Find the parts of a language model.

    Raises:
        ValueError: it has no backbone with one token embedding.
    """
    modules = dict(base.named_modules())
    tables = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and "vision" not in path
    ]
    per_layer = [path for path in tables if _leaf(path) == PER_LAYER_TABLE]
    positions = [path for path in tables if _leaf(path) in _POSITIONS]
    tokens = [path for path in tables if path not in (*per_layer, *positions)]
    if len(tokens) != 1 or "." not in tokens[0]:
        raise ValueError(
            f"{base.model_type} models cannot be used: a backbone with one token embedding is "
            f"needed, found {tokens}"
        )
    [embedding] = tokens
    backbone = embedding.rpartition(".")[0]
    while "." in backbone and len(modules[backbone].children()) == 1:
        backbone = backbone.rpartition(".")[0]  # the embedding has a module of its own
    head = _find_head(base, modules[backbone], modules[embedding])
    return Parts(
        backbone=backbone,
        embedding=embedding,
        per_layer=per_layer[0] if per_layer else None,
        positions=tuple(positions),
        head=f"{backbone}.{head[1]}" if head and head[0] else head[1] if head else None,
        inner_head=_inner_head(modules[backbone], head, _leaf(embedding)),
    )


def module_at(base: Any, path: str) -> Any:
    """Return the module or parameter at a path such as ``model.embed_tokens``."""
    for name in path.split("."):
        base = base[int(name)] if isinstance(base, list) else base[name]
    return base


def with_module(base: Any, path: str, module: nn.Module) -> Any:
    """Return a copy of a model with another module at a path; all others are shared."""
    if isinstance(base, TextModel):  # the copy would set the module in both
        base = base.wrapped
    name, _, rest = path.partition(".")
    other = copy.copy(base)
    other[name] = with_module(base[name], rest, module) if rest else module
    return other


def embedding_dims(embedding: Any) -> int:
    """Width of an embedding, quantised or not."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        return embedding.weight.shape[-1] * 32 // embedding.bits
    return embedding.weight.shape[-1]


def _args(model: Any) -> Any:
    return model.args if hasattr(model, "args") else model.config


def _leaf(path: str) -> str:
    return path.rpartition(".")[-1]


def _find_head(base: Any, backbone: Any, embedding: Any) -> tuple[bool, str] | None:
    """Find the head: whether it is in the backbone, and its path there or in the model."""
    sizes = (embedding_dims(embedding), embedding.weight.shape[0])
    for is_inner, owner in ((False, base), (True, backbone)):
        for path, value in _near(owner):
            if isinstance(value, nn.Linear | nn.QuantizedLinear):
                fits = linear_dims(value) == sizes
            else:
                fits = isinstance(value, mx.array) and value.shape == sizes[::-1]
            if fits and not path.startswith("per_layer"):
                return is_inner, path
    return None


def _near(owner: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and modules of a module, and modules in a head of several layers."""
    for name, value in owner.items():
        yield name, value
        if name == "lm_head" and isinstance(value, nn.Module):
            yield from ((f"{name}.{child}", module) for child, module in value.items())


def _inner_head(backbone: Any, head: tuple[bool, str] | None, embedding: str) -> str | None:
    """Name of the head that a backbone's own code ends in."""
    if head is not None:
        return head[1] if head[0] else None
    names = type(backbone).__call__.__code__.co_names
    return embedding if "as_linear" in names else None
