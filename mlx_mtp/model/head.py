"""The output head: hidden states to the logits of all tokens, or of some of them.

The head is the base model's own code, called with a backbone that returns hidden states that exist
already, so a scale or a limit of the logits applies as the model's class has it.  For some tokens
that code gets a head of their rows only, gathered once: rows of a quantised weight stay packed.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.model.lora import GatedLoRALinear
from mlx_mtp.model.parts import Parts, module_at, with_module
from mlx_mtp.model.wrappers import HiddenStates, MaskEmbedding, WithoutHead, Wrapper

_KINDS = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding


class OutputHead:
    """A base model's own head.

    Args:
        base: the model.  Its modules may be replaced later: they are looked up when a head is
            made, so make one after that.
        parts: its parts.
        rows: what takes the place of the module with the unembedding; None for that module.
    """

    def __init__(self, base: Any, parts: Parts, rows: Any = None) -> None:
        backbone = module_at(base, parts.backbone)
        self._rows = rows
        self._inner: WithoutHead | None = None
        if parts.inner_head is not None:
            self._inner = WithoutHead(backbone, parts.inner_head)
            return
        self._states = HiddenStates(backbone)
        if rows is not None and parts.head is None:
            path = parts.embedding.removeprefix(f"{parts.backbone}.")
            _use(self._states, path, rows)
        self._model = with_module(base, parts.backbone, self._states)
        if rows is not None and parts.head is not None:
            self._model = with_module(self._model, parts.head, rows)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Turn hidden states ``[B, L, D]`` into logits ``[B, L, V]``."""
        if self._inner is not None:
            return self._inner.logits(hidden, self._rows)
        return self._states.head(self._model, hidden)


class PartialHead:
    """A head for some of the tokens; their rows are gathered when it is first used.

    Args:
        base: the model, see ``OutputHead``.
        parts: its parts.
        ids: the tokens, ``[N]``.

    Attributes:
        ids: the tokens, int32 ``[N]``; ``logits`` are in their order.
    """

    def __init__(self, base: Any, parts: Parts, ids: mx.array) -> None:
        self.ids = ids.astype(mx.int32)
        path = parts.head or parts.embedding
        self._rows = select_rows(module_at(base, path), self.ids)
        self._head = OutputHead(base, parts, self._rows)

    def logits(self, hidden: mx.array) -> mx.array:
        """Turn hidden states ``[B, L, D]`` into logits ``[B, L, N]``."""
        return self._head(hidden)

    @property
    def nbytes(self) -> int:
        """Memory of the rows, in bytes."""
        return sum(array.nbytes for array in _arrays(self._rows))


def select_rows(module: Any, ids: mx.array) -> Any:
    """Return an unembedding that has some rows of another one.

    Args:
        module: linear layer, embedding or bare weight ``[V, D]``, quantised or not.  A module of
            another kind must have a method ``select_rows``.
        ids: the rows, ``[N]``.
    """
    if isinstance(module, mx.array):
        return module[ids]
    if isinstance(module, MaskEmbedding):
        return select_rows(module.embedding, ids)
    if isinstance(module, GatedLoRALinear):  # the gate is closed in a head
        return select_rows(module.linear, ids)
    if hasattr(type(module), "select_rows"):
        return module.select_rows(ids)
    assert isinstance(module, _KINDS) and not isinstance(module, Wrapper), type(module)
    part = copy.copy(module)
    dict.update(part, {n: x[ids] for n, x in module.items() if isinstance(x, mx.array)})
    return part


def _use(states: HiddenStates, path: str, module: Any) -> None:
    """Use another sub-module; the wrapped backbone keeps its own."""
    name, _, rest = path.partition(".")
    dict.update(states, {name: with_module(states[name], rest, module) if rest else module})


def _arrays(rows: Any) -> list[mx.array]:
    if isinstance(rows, mx.array):
        return [rows]
    flat: Any = tree_flatten(rows.parameters())
    return [array for _, array in flat]
