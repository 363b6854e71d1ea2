"""The seam in attention: what an mlx-lm block calls once it has queries, keys and values.

``inject_attention`` lets the blocks of a model call another function there, which a back-end
provides.  It is also what makes batched steps possible: queries are attended to answer by answer,
each with its own cache.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base as lm_base
from mlx_lm.models.base import create_attention_mask

from mlx_mtp.model.layout import RowLayout, StepScope
from mlx_mtp.model.one_row import (
    is_latent_attention,
    one_row_function,
    part_ends,
    wrap_latent_products,
)
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

    Multi-head latent attention computes the rows of a step as it computes one row (``one_row``).

    Attributes:
        attention: the injected function; None for mlx-lm's own.
        scope: the model's step scope; with it verify rows attend one by one.
    """

    def __init__(
        self,
        block: nn.Module,
        attention: Attention | None = None,
        *,
        scope: StepScope | None = None,
    ) -> None:
        super().__init__(block)
        call = own_call(block)
        self.attention, self.scope = attention, scope
        names = {**call.__globals__, NAME: _attend_with(attention, scope)}
        self._call = types.FunctionType(
            call.__code__, names, call.__name__, call.__defaults__, call.__closure__
        )
        self._call.__kwdefaults__ = call.__kwdefaults__
        self._signature = inspect.signature(call)
        self._call_as_one_row = (
            one_row_function(call, names) if is_latent_attention(block) else None
        )

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Call the block's own code."""
        one_row = self._call_as_one_row
        layout = None if self.scope is None else self.scope.layout
        if one_row is None or layout is None or layout.is_prompt_chunk:
            return self._call(self.wrapped, *args, **kwargs)
        call = self._signature.bind(self.wrapped, *args, **kwargs)
        x, mask = call.arguments["x"], call.arguments.get("mask")
        cache: Any = call.arguments.get("cache")
        if hasattr(cache, "call_each"):  # its own code multiplies by the keys of all rows
            return cache.call_each(self, x, mask)
        if isinstance(mask, str):  # one row has an array or None
            call.arguments["mask"] = create_attention_mask(x, cache, return_array=True)
        return one_row(*call.args, **call.kwargs)


def inject_attention(base: nn.Module, attention: Attention | None) -> dict[str, nn.Module]:
    """Let the attention blocks of a model call a function, in place.

    Args:
        base: an mlx-lm model.
        attention: the function; None for mlx-lm's own.

    Returns:
        The modules that were replaced, by path; ``replace`` restores them.
    """
    blocks = attention_blocks(base)
    replace(base, {path: _seam(block, attention=attention) for path, block in blocks.items()})
    return blocks


def _seam(block: Any, **changes: Any) -> AttentionSeam:
    """Make the seam of a block, or one like that which it has."""
    if isinstance(block, AttentionSeam):
        changes = {"attention": block.attention, "scope": block.scope, **changes}
        block = block.wrapped
    return AttentionSeam(block, **changes)


def wrap_verify_attention(base: nn.Module, scope: StepScope) -> bool:
    """Let attention that has no kernel of ours compute verify rows one by one, in place.

    MLX has another kernel for one query than for several.  Ours do not (``backends``), but they
    take no scores to be added, no sinks, and no values of another size than keys.

    Returns:
        Whether there is latent attention with a form of its own for one row.
    """
    wrap_latent_products(base, scope)
    blocks = attention_blocks(base).items()
    replace(base, {path: _seam(each, scope=scope) for path, each in blocks if _stays_stock(each)})
    return any(is_latent_attention(block) for _, block in blocks)


def _stays_stock(block: Any) -> bool:
    """Whether no kernel of ours takes the keys and values of a block."""
    names = ("sinks", "attention_sink_bias", "v_head_dim")
    return is_latent_attention(block) or any(getattr(block, x, None) is not None for x in names)


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


def _attend_with(
    attention: Attention | None, scope: StepScope | None = None
) -> Callable[..., mx.array]:
    """Make a function with the arguments of mlx-lm's ``scaled_dot_product_attention``.

    With a scope the verify rows of a step attend one by one, each to the keys up to its own.
    """

    def attend(
        queries: Any,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        def attend_part(queries: Any, keys: Any, values: Any, mask: Any, cache: Any) -> mx.array:
            is_plain = sinks is None and not hasattr(cache, "bits")  # mlx-lm's test for quantised
            if attention is not None and is_plain:
                y = attention(queries, keys, values, scale=scale, mask=mask)
                if y is not None:
                    return y
            return lm_base.scaled_dot_product_attention(
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )

        def attend_rows(queries: Any, keys: Any, values: Any, mask: Any, cache: Any) -> mx.array:
            layout = None if scope is None else scope.layout
            if layout is None or layout.is_prompt_chunk or hasattr(cache, "bits"):
                return attend_part(queries, keys, values, mask, cache)
            parts = _row_parts(layout, queries, keys, values, mask)
            return mx.concatenate([attend_part(*part, cache=cache) for part in parts], axis=2)

        if hasattr(cache, "attend"):  # a batch: keys, values and mask have one part per answer
            return cache.attend(attend_rows, queries, keys, values, mask)
        return attend_rows(queries, keys, values, mask, cache)

    return attend


def _row_parts(
    layout: RowLayout, queries: mx.array, keys: mx.array, values: mx.array, mask: Any
) -> Iterator[tuple[Any, ...]]:
    """Split attention from ``[1, H, L, Dh]`` to ``[1, Hkv, S, Dh]``: each verify row, all masks.

    Args:
        layout: the rows.
        queries: of all rows.
        keys: cached ones, then those of the rows.
        values: likewise.
        mask: ``[L, S]`` or ``[1, H, L, S]``, ``"causal"`` or None.
    """
    num_rows, first = queries.shape[2], 0
    cached = keys.shape[2] - num_rows
    for end in [*part_ends(layout, 1), *([num_rows] if layout.num_masks else [])]:
        rows, seen = slice(first, end), cached + end
        part = mask[..., rows, :seen] if isinstance(mask, mx.array) else mask
        part = None if isinstance(part, str) and end - first == 1 else part
        yield queries[:, :, rows], keys[:, :, :seen], values[:, :, :seen], part
        first = end
