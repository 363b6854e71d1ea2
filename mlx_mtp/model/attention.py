"""The seam in attention: what an mlx-lm block calls once it has queries, keys and values.

``inject_attention`` lets the blocks of a model call another function there, which a back-end
provides.  It is also what makes batched steps possible: queries are attended to answer by answer,
each with its own cache.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base as lm_base

from mlx_mtp.model.wrappers import Wrapper, own_call, replace

NAME = "scaled_dot_product_attention"


class Attention(Protocol):
    """A replacement for mlx-lm's attention."""

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
    ) -> mx.array | None:
        """Attend from rows ``[B, H, L, D]`` to keys and values ``[B, Hkv, S, D]``.

        Args:
            queries: elements of a head are contiguous, as in all three arrays.
            keys: never quantised.
            values: likewise.
            scale: factor of the scores.
            mask: ``"causal"``, an array ``[L, S]`` (or with leading axes) or None.

        Returns:
            ``[B, H, L, D]``; None leaves the call to mlx-lm.
        """
        ...


class AttentionSeam(Wrapper):
    """An attention block of mlx-lm that calls an injected function.

    mlx-lm's blocks call ``scaled_dot_product_attention`` by a global name of their own file and
    take no other function as an argument.  Rebinding that name in mlx-lm would change every model
    in the process, so the block's own code is run with a namespace in which it is bound anew.
    """

    def __init__(self, block: nn.Module, attention: Attention | None = None) -> None:
        super().__init__(block)
        call = own_call(block)
        names = {**call.__globals__, NAME: _attend_with(attention)}
        self._call = types.FunctionType(
            call.__code__, names, call.__name__, call.__defaults__, call.__closure__
        )
        self._call.__kwdefaults__ = call.__kwdefaults__

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Call the block's own code."""
        return self._call(self.wrapped, *args, **kwargs)


def inject_attention(base: nn.Module, attention: Attention | None) -> dict[str, nn.Module]:
    """Let the attention blocks of a model call a function, in place.

    Args:
        base: an mlx-lm model.
        attention: the function; None for mlx-lm's own.

    Returns:
        The modules that were replaced, by path; ``replace`` restores them.
    """
    blocks = attention_blocks(base)
    seams = {
        path: AttentionSeam(block.wrapped if isinstance(block, AttentionSeam) else block, attention)
        for path, block in blocks.items()
    }
    replace(base, seams)
    return blocks


def attention_blocks(base: nn.Module) -> dict[str, nn.Module]:
    """Find the modules of a model, by path, that call mlx-lm's attention in their own code."""
    return {path: module for path, module in base.named_modules() if _has_seam(module)}


def _has_seam(module: nn.Module) -> bool:
    if isinstance(module, AttentionSeam):
        return True
    call = own_call(module)
    return (
        isinstance(call, types.FunctionType)
        and NAME in call.__code__.co_names
        and call.__globals__.get(NAME) is lm_base.scaled_dot_product_attention
    )


def _attend_with(attention: Attention | None) -> Callable[..., mx.array]:
    """Make a function with the arguments of mlx-lm's ``scaled_dot_product_attention``."""

    def attend(
        queries: Any,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        def attend_one(queries: Any, keys: Any, values: Any, mask: Any, cache: Any) -> mx.array:
            is_plain = sinks is None and not hasattr(cache, "bits")  # mlx-lm's test for quantised
            if attention is not None and is_plain:
                y = attention(queries, keys, values, scale=scale, mask=mask)
                if y is not None:
                    return y
            return lm_base.scaled_dot_product_attention(
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )

        if hasattr(cache, "attend"):  # a batch: keys, values and mask have one part per answer
            return cache.attend(attend_one, queries, keys, values, mask)
        return attend_one(queries, keys, values, mask, cache)

    return attend
