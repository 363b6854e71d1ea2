"""Attention and SwiGLU blocks with ``fast_math``'s exponentials, for MLX's CPU back-end.

A step of many rows spends more time in MLX's ``exp`` than in matmuls.  Attention has a seam
(``model.attention``) that takes another function.  SwiGLU has none, so a block of the common shape
is replaced by one that computes the same from the same sub-modules, if both give the same values
for random input.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.cpu.fast_math import softmax, swiglu
from mlx_mtp.model.attention import inject_attention
from mlx_mtp.model.wrappers import Wrapper, replace

_MLP_NAMES = {"gate_proj", "up_proj", "down_proj"}
_TOLERANCE = 1e-4
_RECENT_MASKS = 8  # a forward has one or two masks per answer


class FastMLP(Wrapper):
    """``down(silu(gate(x)) * up(x))``."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FastAttention:
    """Grouped-query attention in basic operations, float32."""

    def __init__(self) -> None:
        self._biases = MaskBiases()

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
    ) -> mx.array | None:
        """Attend from ``[B, H, L, Dh]`` to ``[B, Hkv, S, Dh]``; None for other types."""
        if queries.dtype != mx.float32:
            return None
        batch, heads, *rest = queries.shape
        kv_heads = keys.shape[1]
        grouped = (queries * scale).reshape(batch, kv_heads, heads // kv_heads, *rest)
        scores = grouped @ keys[:, :, None].swapaxes(-1, -2)  # [B, Hkv, H / Hkv, L, S]
        if mask is not None:
            bias = self._biases.of(mask, scores)
            if bias.ndim == 4:  # [B, 1 or H, L, S]
                groups = kv_heads if bias.shape[1] > 1 else 1
                bias = mx.unflatten(bias, 1, (groups, -1))
            scores = scores + bias
        out = softmax(scores) @ values[:, :, None]
        return out.reshape(batch, heads, *out.shape[3:])


class MaskBiases:
    """Attention masks as numbers to add; the layers of a forward share masks and their numbers."""

    def __init__(self) -> None:
        self._recent: deque[tuple[mx.array, mx.array]] = deque(maxlen=_RECENT_MASKS)

    def of(self, mask: Any, scores: mx.array) -> mx.array:
        """Return 0 where a row may see a column, else minus infinity.

        Args:
            mask: ``"causal"``, a bool array, or an array of numbers to add.
            scores: ``[..., L, S]``, for the shape.
        """
        if isinstance(mask, str):
            rows, columns = scores.shape[-2:]
            return _bias(mx.arange(columns) <= mx.arange(columns - rows, columns)[:, None])
        if mask.dtype != mx.bool_:
            return mask
        for known, bias in self._recent:
            if known is mask:
                return bias
        self._recent.append((mask, _bias(mask)))
        return self._recent[-1][1]


def _bias(sees: mx.array) -> mx.array:
    return mx.where(sees, 0.0, -mx.inf)


def replace_blocks(base: nn.Module) -> None:
    """Let the attention and SwiGLU blocks of a float32 model use fast exponentials, in place."""
    inject_attention(base, FastAttention())
    candidates = {
        path: FastMLP(block)
        for path, block in base.named_modules()
        if set(block.children()) == _MLP_NAMES
    }
    replace(base, {path: block for path, block in candidates.items() if _agrees(block)})


def _agrees(block: FastMLP) -> bool:
    """Whether a block gives the same values as the one that it wraps."""
    try:
        x = mx.random.normal((1, 5, block.gate_proj.weight.shape[-1]), key=mx.random.key(0))
        expected, actual = block.wrapped(x), block(x)
        error = mx.abs(expected - actual).max() / (mx.abs(expected).max() + 1e-9)
        return bool((error < _TOLERANCE).item())
    except (TypeError, ValueError, AttributeError):
        return False
