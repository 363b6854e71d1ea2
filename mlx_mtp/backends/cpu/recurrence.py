"""The gated delta rule in fewer passes over its state, for MLX's CPU back-end.

mlx-lm's operations pass over the state six times per row.  Here k and q read it in one product
before it is updated, so that a row takes that product and the update:

    S_t = g S + d k^T      d = beta (v - (g S) k)      S_t q = (g S) q + (k . q) d

Rows run one after another in operations of the same shapes, so that a row has the same bits
whatever the number of rows.  Mask rows need no state after them: their results come from the state
before their group by the same equations, put into each other (the chunked form of Yang et al.,
2024).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta as lm_gated_delta

from mlx_mtp.model.recurrence import RecurrenceFunction, States, inject_functions


def use_fast_recurrences(base: nn.Module) -> None:
    """Let the recurrent layers of a float32 model use these functions, in place."""
    inject_functions(base, {"gated_delta_update": RecurrenceFunction(update, outputs)})


def update(
    q: mx.array, k: mx.array, v: mx.array, *args: Any, state: mx.array | None = None, **options: Any
) -> tuple[mx.array, mx.array]:
    """Run rows; arguments as in mlx-lm's ``gated_delta_update``.

    Returns:
        ``[B, L, Hv, Dv]``, and the state ``[B, Hv, Dv, Dk]`` after the rows.
    """
    if not _takes(q, options):
        return lm_gated_delta.gated_delta_update(q, k, v, *args, state=state, **options)
    q, k, g, beta, state = _prepare(q, k, v, *args, state=state, **options)
    queries = mx.stack([k, q], axis=-2) * g  # [B, L, Hv, 2, Dk]
    overlaps = (k * q).sum(-1, keepdims=True)
    results = []
    for t in range(q.shape[1]):
        read = queries[:, t] @ state.swapaxes(-1, -2)  # [B, Hv, 2, Dv]
        delta = (v[:, t] - read[:, :, 0]) * beta[:, t]
        results.append(read[:, :, 1] + overlaps[:, t] * delta)
        state = state * g[:, t] + delta[..., None] * k[:, t, :, None]
    return mx.stack(results, axis=1), state


def outputs(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *args: Any,
    states: States,
    **options: Any,
) -> mx.array:
    """Run rows whose state nobody needs; other arguments as in ``update``.

    Args:
        q: ``[B, L, Hk, Dk]``.
        k: likewise.
        v: ``[B, L, Hv, Dv]``.
        args: a, b, ``A_log`` and ``dt_bias``.
        states: before the first row, ``[B, Hv, Dv, Dk]`` or ``[1, Hv, Dv, Dk]`` for each of B.
        options: others of ``gated_delta_update``.

    Returns:
        ``[B, L, Hv, Dv]``, up to rounding those of ``update``.
    """
    if not _takes(q, options):
        state = states if isinstance(states, mx.array) else mx.concatenate(states)
        return lm_gated_delta.gated_delta_update(q, k, v, *args, state=state, **options)[0]
    q, k, g, beta, _ = _prepare(q, k, v, *args, state=None, **options)
    q, k, v, beta = (x.swapaxes(1, 2) for x in (q, k, v, beta))  # [B, Hv, L, ...]
    g = g.swapaxes(1, 2)  # [B, Hv, L, 1, 1 or Dk]
    num_rows = q.shape[2]
    # What is left after row t of what row j has added, and of the state: [B, Hv, L, 1 + L, ...]
    later = mx.tri(num_rows, num_rows + 1, dtype=mx.bool_)[..., None]
    left = mx.cumprod(mx.where(later, g, 1.0), axis=2)
    both = mx.stack([k, q], axis=2)  # [B, Hv, 2, L, Dk]
    queries = (both * left[:, :, None, :, 0]).flatten(2, 3)
    if isinstance(states, mx.array):
        read = queries @ states.swapaxes(-1, -2)
    else:  # which are not copied into one array
        pairs = zip(queries, states, strict=True)
        read = mx.concatenate([rows[None] @ state.swapaxes(-1, -2) for rows, state in pairs])
    memory, y = mx.split(read, 2, axis=2)  # [B, Hv, L, Dv]
    overlaps = (both[:, :, :, :, None] * (left[:, :, :, 1:] * k[:, :, None])[:, :, None]).sum(-1)
    of_keys, of_queries = overlaps[:, :, 0], mx.tril(overlaps[:, :, 1])  # [B, Hv, L, L]
    deltas = (v - memory)[:, :, :1] * beta[:, :, :1]
    for t in range(1, num_rows):
        row = slice(t, t + 1)
        recalled = memory[:, :, row] + of_keys[:, :, row, :t] @ deltas
        deltas = mx.concatenate([deltas, (v[:, :, row] - recalled) * beta[:, :, row]], axis=2)
    return (y + of_queries @ deltas).swapaxes(1, 2)


def _takes(q: mx.array, options: dict[str, Any]) -> bool:
    return q.dtype == mx.float32 and options.get("mask") is None


def _prepare(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *,
    state: mx.array | None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    **others: Any,
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Heads of q and k repeated, g ``[B, L, Hv, 1, 1 or Dk]``, beta ``[B, L, Hv, 1]``, a state."""
    del others
    repeats = v.shape[2] // k.shape[2]
    q, k = (mx.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (q, k))
    beta = mx.sigmoid(b)[..., None]
    if allow_neg_eigval:
        beta = 2.0 * beta
    if lower_bound is None:
        g = lm_gated_delta.compute_g(A_log, a, dt_bias)
    else:
        g = lm_gated_delta.compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    g = g[..., None, None] if g.ndim == 3 else g[..., None, :]
    if state is None:
        state = mx.zeros((v.shape[0], *v.shape[2:], k.shape[-1]))
    return q, k, g, beta, state
