"""Twins of attention and SwiGLU blocks for MLX's CPU back-end, with ``fast_math``'s exponentials.

A step of many rows spends more time in MLX's ``exp`` than in matmuls.  mlx-lm's blocks offer no
seam there, so blocks of the common shape get a twin that computes the same from the same
sub-modules.  Whether a block has that shape is found out, not guessed: a twin replaces a block only
if both give the same values for random input, with and without a cache and a mask.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from mlx_mtp.backends.cpu.fast_math import softmax, swiglu
from mlx_mtp.model.batch_cache import BatchLayerCache, Several

_MLP_NAMES = {"gate_proj", "up_proj", "down_proj"}
_ATTENTION_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "rope"}
_TOLERANCE = 1e-4


class DenseMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        _take_over(self, block)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DenseAttention(nn.Module):
    """Grouped-query attention with rotary embedding, with or without norms of queries and keys."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    rope: Any
    n_heads: int
    n_kv_heads: int
    scale: float

    def __init__(self, block: nn.Module, biases: MaskBiases) -> None:
        super().__init__()
        _take_over(self, block)
        self._biases = biases

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Map ``[B, L, D]`` to ``[B, L, D]``."""
        queries = self._heads(self.q_proj(x), "q_norm", self.n_heads)
        keys = self._heads(self.k_proj(x), "k_norm", self.n_kv_heads)
        values = self._heads(self.v_proj(x), None, self.n_kv_heads)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if isinstance(cache, BatchLayerCache):
            held: Any = (keys, values, self._biases.of_several(mask))
            out = cache.attend_each(self._attend, queries, *held)
        else:
            out = self._attend(queries, keys, values, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(*x.shape[:-1], -1))

    def _heads(self, x: mx.array, norm: str | None, heads: int) -> mx.array:
        x = x.reshape(*x.shape[:-1], heads, -1)
        if norm is not None and norm in self:
            x = getattr(self, norm)(x)
        return x.transpose(0, 2, 1, 3)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
        """Attention of ``[B, H, L, Dh]`` over ``[B, Hkv, S, Dh]``."""
        groups = self.n_heads // self.n_kv_heads
        queries = (queries * self.scale).reshape(
            queries.shape[0], self.n_kv_heads, groups, *queries.shape[2:]
        )
        scores = queries @ keys[:, :, None].swapaxes(-1, -2)
        if mask is not None:
            bias = self._biases.of(mask, scores)
            scores = scores + (bias if bias.ndim < 4 else bias[:, :, None])
        out = softmax(scores) @ values[:, :, None]
        return out.reshape(out.shape[0], self.n_heads, *out.shape[3:])


class MaskBiases:
    """Attention masks as numbers to add; all layers of a forward share a mask and its numbers."""

    def __init__(self) -> None:
        self._last: tuple[Any, Any] | None = None

    def of(self, mask: Any, scores: mx.array) -> mx.array:
        """0 where a row may see a column, else minus infinity.

        Args:
            mask: ``"causal"``, a bool array, or numbers to add already.
            scores: ``[..., L, S]``, for the shape.
        """
        if isinstance(mask, str):
            rows, columns = scores.shape[-2:]
            mask = mx.arange(columns) <= mx.arange(columns - rows, columns)[:, None]
        elif self._last is not None and self._last[0] is mask:
            return self._last[1]
        if mask.dtype != mx.bool_:
            return mask
        bias = _bias(mask)
        self._last = (mask, bias)
        return bias

    def of_several(self, masks: Several) -> Several:
        """The same for each answer of a packed forward; what is no array stays as it is."""
        if self._last is None or self._last[0] is not masks:
            parts = [_bias(part) if isinstance(part, mx.array) else part for part in masks.parts]
            self._last = (masks, Several(parts))
        return self._last[1]


def _bias(mask: mx.array) -> mx.array:
    """A bool mask as numbers to add."""
    return mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask


def replace_blocks(base: nn.Module) -> None:
    """Give every block of the common shape its twin, in place."""
    biases = MaskBiases()
    for path, block in base.named_modules():
        twin = _twin(block, biases)
        if twin is not None and _agree(block, twin):
            parent, _, name = path.rpartition(".")
            owner: Any = _at(base, parent)
            setattr(owner, name, twin)


def _twin(block: Any, biases: MaskBiases) -> nn.Module | None:
    """The twin that a block might have, by the names in it."""
    names = set(block.children())
    if names == _MLP_NAMES:
        return DenseMLP(block)
    has_heads = all(hasattr(block, name) for name in ("n_heads", "n_kv_heads", "scale"))
    if has_heads and names >= _ATTENTION_NAMES and names <= _ATTENTION_NAMES | {"q_norm", "k_norm"}:
        return DenseAttention(block, biases)
    return None


def _agree(block: Any, twin: Any) -> bool:
    """Whether both give the same values, and the same again behind what a cache holds."""
    first = block.gate_proj if isinstance(twin, DenseMLP) else block.q_proj
    x = mx.random.normal((1, 5, first.weight.shape[-1]), key=mx.random.key(0))
    try:
        if isinstance(twin, DenseMLP):
            return _close(block(x), twin(x))
        return _close(block(x, "causal"), twin(x, "causal")) and _agree_cached(block, twin, x)
    except (TypeError, ValueError, AttributeError):
        return False


def _agree_cached(block: Any, twin: Any, x: mx.array) -> bool:
    ours, theirs = KVCache(), KVCache()
    if not _close(block(x[:, :2], None, theirs), twin(x[:, :2], None, ours)):
        return False
    mask = mx.array([[True, False, True, False, False], [True, True, False, True, False]] * 2)[:3]
    return _close(block(x[:, 2:], mask, theirs), twin(x[:, 2:], mask, ours))


def _close(left: mx.array, right: mx.array) -> bool:
    error = mx.abs(left - right).max() / (mx.abs(left).max() + 1e-9)
    return bool((error < _TOLERANCE).item())


def _take_over(twin: nn.Module, block: nn.Module) -> None:
    """Let a twin hold what the block holds: sub-modules, parameters, plain attributes."""
    dict.update(twin, block)
    twin.__dict__.update(block.__dict__)


def _at(base: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        base = base[int(name)] if isinstance(base, list) else getattr(base, name)
    return base
