"""Attention blocks that attend from few rows with our kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as lm_cache

from mlx_mtp.backends.metal.attention import step_attention_kernel, takes
from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.operations import AttentionKey, StepAttentionOperation
from mlx_mtp.model.attention import inject_attention
from mlx_mtp.model.wrappers import replace


class StepAttention:
    """Attention with our kernel where that was chosen; see ``model.attention.Attention``."""

    def __init__(self, choices: Mapping[AttentionKey, KernelChoice]) -> None:
        self.choices = dict(choices)

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
    ) -> mx.array | None:
        """Attend from ``[1, H, M, D]`` to ``[1, Hkv, N, D]``; None leaves it to stock MLX."""
        if not takes(queries, keys, values, mask):
            return None
        choice = self.choices.get(AttentionKey.of(queries, keys))
        if choice is None or not choice.ours:
            return None
        return step_attention_kernel(queries, keys, values, scale=scale, mask=mask)


def use_attention(base: nn.Module, choices: Mapping[AttentionKey, KernelChoice]) -> bool:
    """Let the attention blocks of a model use our kernel where it was chosen, in place.

    Returns:
        Whether any block does.
    """
    if not any(choice.ours for choice in choices.values()):
        return False
    return bool(inject_attention(base, StepAttention(choices)))


def attention_operations(base: nn.Module) -> list[StepAttentionOperation]:
    """Find the shapes for which a model calls attention and for which there is a kernel.

    The model is called with one token; nothing is evaluated.
    """
    shapes: dict[AttentionKey, None] = {}

    def observe(
        queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
    ) -> None:
        del scale
        if takes(queries, keys, values, mask):
            shapes[AttentionKey.of(queries, keys)] = None

    blocks = inject_attention(base, observe)
    try:
        base(mx.array([[0]]), cache=lm_cache.make_prompt_cache(base))
    except Exception:  # a model with another signature keeps its attention
        return []
    finally:
        replace(base, blocks)
    return [StepAttentionOperation(key) for key in shapes]
