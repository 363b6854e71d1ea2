"""Products that give a row the same bits in every company, so that a check can ask for bits.

A BLAS sums one row in another order than several, so a model's own rows differ in the last bits
from step to step.  Here every product and every attention is computed row by row, as mlx-mtp's
kernels do; whatever differs then, differs for a reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

_matmul, _times, _addmm = mx.matmul, mx.array.__matmul__, mx.addmm
_attention = mx.fast.scaled_dot_product_attention


@contextlib.contextmanager
def row_exact() -> Iterator[None]:
    """Compute products and attention row by row, in the whole process, inside of the block."""
    array: Any = mx.array
    array.__matmul__, mx.matmul, mx.addmm = _product, _product, _sum_and_product
    mx.fast.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        array.__matmul__, mx.matmul, mx.addmm = _times, _matmul, _addmm
        mx.fast.scaled_dot_product_attention = _attention


def _product(a: Any, b: Any, **options: Any) -> Any:
    """``a @ b``, ``[..., L, K]`` and ``[..., K, N]`` to ``[..., L, N]``."""
    if a.ndim < 2 or b.ndim < 2 or a.size == a.shape[-1]:
        return _matmul(a, b, **options)
    if b.ndim == 2:  # all axes but the last are rows
        return _by_rows(_matmul, a, b, **options)
    rows, columns = a[..., None, :], b[..., None, :, :]
    shape = (*columns.shape[:-3], a.shape[-2], *b.shape[-2:])
    return _matmul(rows, mx.broadcast_to(columns, shape), **options)[..., 0, :]


def _sum_and_product(
    c: Any, a: Any, b: Any, alpha: float = 1.0, beta: float = 1.0, **options: Any
) -> Any:
    """``alpha * (a @ b) + beta * c``."""
    if c.ndim > 1 or b.ndim != 2 or a.size == a.shape[-1]:
        return _addmm(c, a, b, alpha, beta, **options)
    return _by_rows(lambda x, y, **rest: _addmm(c, x, y, alpha, beta, **rest), a, b, **options)


def _by_rows(multiply: Callable[..., Any], a: Any, b: Any, **options: Any) -> Any:
    """A batch of one-row products, which mlx computes one after another; ``b`` is not copied."""
    flat = a.reshape(-1, 1, a.shape[-1])
    product = multiply(flat, mx.broadcast_to(b, (flat.shape[0], *b.shape)), **options)
    return product.reshape(*a.shape[:-1], b.shape[-1])


def _attend(q: Any, k: Any, v: Any, *, scale: float, mask: Any = None, **options: Any) -> Any:
    """Attention of each row ``[B, H, L, D]`` to the keys and values that it sees, and no others."""
    rows, cached = q.shape[2], k.shape[2]
    if isinstance(mask, mx.array):
        whole = mask.dtype == mx.bool_ and all(size == 1 for size in mask.shape[:-2])
        if not whole:
            return _attention(q, k, v, scale=scale, mask=mask, **options)
        sees = np.array(mx.broadcast_to(mask.reshape(mask.shape[-2:]), (rows, cached)))
    elif mask == "causal":
        sees = np.tril(np.ones((rows, cached), bool), cached - rows)
    else:
        sees = np.ones((rows, cached), bool)
    parts = []
    for i in range(rows):
        seen = mx.array(np.nonzero(sees[i])[0])
        row = q[:, :, i : i + 1]
        parts.append(_attention(row, k[:, :, seen], v[:, :, seen], scale=scale, **options))
    return parts[0] if rows == 1 else mx.concatenate(parts, axis=2)
