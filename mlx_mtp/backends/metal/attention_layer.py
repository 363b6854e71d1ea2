"""Attention that goes through our kernels: put into a model that is loaded.

mlx-lm's models call ``scaled_dot_product_attention`` by a name of their own module, with the cache
at hand.  ``hook`` binds that name to a function that asks the cache's ``attention`` first.  Caches
without one, which are all but those of a model that ``use_attention`` has seen, go on as before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base as lm_base
from mlx_lm.models import cache as lm_cache

from mlx_mtp.backends.metal.attention import step_attention_kernel, takes
from mlx_mtp.backends.metal.choice import KernelChoice

NAME = "scaled_dot_product_attention"
ATTRIBUTE = "_step_attention"  # of a model that has been told what to use


class AttentionKey(NamedTuple):
    """What a choice depends on."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, queries: mx.array, keys: mx.array) -> AttentionKey:
        """The key of a call with ``[1, H, M, D]`` queries and ``[1, Hkv, N, D]`` keys."""
        return cls(queries.shape[1], keys.shape[1], keys.shape[3], keys.dtype)

    @property
    def name(self) -> str:
        """Such as ``attention 9/3 heads of 64 float16``."""
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return f"attention {self.heads}/{self.kv_heads} heads of {self.head_dim} {dtype}"


class StepAttention:
    """Attends with our kernel where that was chosen; what a cache carries as ``attention``."""

    def __init__(self, choices: Mapping[AttentionKey, KernelChoice]) -> None:
        self.choices = dict(choices)

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
    ) -> mx.array | None:
        """Attend from ``[1, H, M, D]`` to ``[1, Hkv, N, D]``; None where stock MLX must.

        Keys and values are slices of a ``KVCache``: their elements lie side by side.
        """
        if not takes(queries, keys, values, mask):
            return None
        choice = self.choices.get(AttentionKey.of(queries, keys))
        if choice is None or not choice.ours:
            return None
        return step_attention_kernel(queries, keys, values, scale=scale, mask=mask)


def attention_of(base: nn.Module) -> StepAttention | None:
    """What the caches of a model should carry."""
    return getattr(base, ATTRIBUTE, None)


def use_attention(base: nn.Module, choices: Mapping[AttentionKey, KernelChoice]) -> bool:
    """Let a model's attention use our kernel where it was chosen; caches made from now on say so.

    Returns:
        Whether anything will.
    """
    if not any(choice.ours for choice in choices.values()) or not hook(base):
        return False
    setattr(base, ATTRIBUTE, StepAttention(choices))
    return True


def attention_keys(base: nn.Module) -> list[AttentionKey]:
    """The shapes for which a model calls attention and for which there is a kernel.

    The model is called with one token and watched; nothing is evaluated.
    """
    if not hook(base):
        return []
    seen: dict[AttentionKey, None] = {}

    def look(
        queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
    ) -> None:
        del scale, mask
        if takes(queries, keys, values):
            seen[AttentionKey.of(queries, keys)] = None

    caches = lm_cache.make_prompt_cache(base)
    for cache in caches:
        cache.attention = look
    try:
        base(mx.array([[0]]), cache=caches)
    except Exception:  # a model that is called in another way keeps its attention
        return []
    return list(seen)


def hook(base: nn.Module) -> bool:
    """Let the modules of a model ask the cache first; once each.

    Returns:
        Whether there is one that does now.
    """
    names = {type(module).__module__ for _, module in base.named_modules()}
    found = False
    for module in (sys.modules[name] for name in sorted(names) if name in sys.modules):
        function: Any = getattr(module, NAME, None)
        if function is lm_base.scaled_dot_product_attention:
            setattr(module, NAME, _asking(function))
            found = True
        found = found or getattr(function, "asks_the_cache", False)
    return found


def _asking(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(original)
    def attend(
        queries: Any,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: Any = None,
    ) -> mx.array:
        ours = getattr(cache, "attention", None)
        if ours is not None and sinks is None:
            result = ours(queries, keys, values, scale=scale, mask=mask)
            if result is not None:
                return result
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    attend.asks_the_cache = True  # type: ignore[attr-defined]
    return attend
