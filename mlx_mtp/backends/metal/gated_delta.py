"""The gated delta rule over the rows of a step, which reads its state once and writes it once.

The source is in ``metal/gated_delta_step.metal``; sums are those of mlx-lm's kernels of one row, so
a row has the bits that it has alone, and those of plain decoding with mlx-lm.  It serves Gated
DeltaNet (a gate for each head) and Kimi Delta Attention (a gate for each key dimension, too).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.matmul import DTYPES, MAX_ROWS, Launch
from mlx_mtp.backends.metal.recurrence import StepRuns, fill_up, run_rows

MAX_KEY_DIM = 256  # more elements of the state would not stay in a lane's registers
_PACKED_KEY_DIM = 128  # mlx-lm packs eight rows of such a state into a simdgroup
_PACKED_ROWS = 8


class DeltaRows(NamedTuple):
    """Inputs of the gated delta rule.

    Attributes:
        q: ``[L, Hk, Dk]``, scaled.
        k: ``[L, Hk, Dk]``, normalised.
        v: ``[L, Hv, Dv]``.
        g: factor of the state, float32 ``[L, Hv]`` or ``[L, Hv, Dk]``.
        beta: ``[L, Hv]``.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array

    def rows(self, first: int, last: int) -> DeltaRows:
        """Rows ``first`` to ``last``."""
        return DeltaRows(*(x[first:last] for x in self))


def takes(rows: DeltaRows, state: mx.array) -> bool:
    """Whether there is a kernel for these arguments of ``gated_delta_step_kernel``."""
    num_rows, key_heads, key_dim = rows.k.shape
    heads, value_dim = rows.v.shape[1:]
    one_type = rows.q.dtype == rows.k.dtype == rows.v.dtype and rows.q.dtype in DTYPES
    floats = rows.g.dtype == state.dtype == mx.float32 and rows.beta.dtype in DTYPES
    shapes = (
        state.shape == (heads, value_dim, key_dim)
        and heads % key_heads == 0
        and key_dim % 32 == 0
        and key_dim <= MAX_KEY_DIM
    )
    return one_type and floats and shapes and num_rows <= MAX_ROWS


def gated_delta_step_ops(
    rows: DeltaRows, kept: DeltaRows, runs: StepRuns, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rows of a step one after another in plain operations.

    Args:
        rows: of the step, ordinary ones first.
        kept: of the last step, ``runs.num_kept`` of which are run again first; q is not read.
        runs: which rows follow which.
        state: ``[Hv, Dv, Dk]`` before the kept rows.

    Returns:
        ``[L, Hv, Dv]``, and the state after the kept rows.
    """
    return run_rows(_row_ops, rows, kept, runs, state)


def _row_ops(rows: DeltaRows, row: int, state: mx.array) -> tuple[mx.array, mx.array]:
    """One row: ``[Hv, Dv]`` and the state after it."""
    repeats = rows.v.shape[1] // rows.k.shape[1]
    q, k = (mx.repeat(x[row], repeats, axis=0)[:, None] for x in (rows.q, rows.k))
    g, beta = rows.g[row], rows.beta[row][:, None]
    state = state * (g[:, None, None] if g.ndim == 1 else g[:, None])
    delta = (rows.v[row] - (state * k).sum(-1)) * beta
    state = state + k * delta[..., None]
    return (state * q).sum(-1).astype(rows.q.dtype), state


def gated_delta_step_launch(
    rows: DeltaRows, kept: DeltaRows, runs: StepRuns, state: mx.array
) -> Launch:
    """Describe how the kernel runs the rows; arguments as in ``gated_delta_step_ops``.

    Without ordinary rows nothing but the state is computed.

    Returns:
        A launch whose outputs are ``[L, Hv, Dv]`` and the state after the kept rows.
    """
    key_heads, key_dim = rows.k.shape[1:]
    num_rows, heads, value_dim = rows.v.shape
    by_key = rows.g.ndim == 3
    packed = key_dim == _PACKED_KEY_DIM and value_dim % _PACKED_ROWS == 0 and not by_key
    template: dict[str, Any] = {
        "T": rows.q.dtype,
        "B": rows.beta.dtype,
        "Dk": key_dim,
        "Dv": value_dim,
        "Hk": key_heads,
        "Hv": heads,
        "lanes": 32 // _PACKED_ROWS if packed else 32,
        "by_key": by_key,
    }
    return Launch(
        name="mlx_mtp_gated_delta_step",
        source=_CALL,
        inputs={
            **{name: fill_up(x) for name, x in rows._asdict().items()},
            **{f"kept_{name}": fill_up(x) for name, x in kept._asdict().items() if name != "q"},
            "order": runs.order(),
            "state_in": state,
        },
        template=template,
        grid=(32, value_dim // _PACKED_ROWS if packed else value_dim, heads),
        threadgroup=(32, 2 if packed else 4, 1),
        output_shape=(num_rows, heads, value_dim),
        output_dtype=rows.q.dtype,
        more_outputs={"state_out": (state.shape, mx.float32)},
    )


def gated_delta_step_kernel(
    rows: DeltaRows, kept: DeltaRows, runs: StepRuns, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rows of a step on Metal; arguments and result as in ``gated_delta_step_ops``.

    Raises:
        RuntimeError: see ``matmul.run_all``.
    """
    y, stored = kernels.run_all(gated_delta_step_launch(rows, kept, runs, state))
    return y, stored


_CALL = """typedef DeltaRows<DeltaShape<T, B, Dk, Dv, Hk, Hv, lanes, by_key>> Rows;
const int lane = thread_index_in_simdgroup;
const int head = thread_position_in_grid.z;
const int value = thread_position_in_grid.y * (32 / lanes) + lane / lanes;
const int key = lane % lanes * Rows::each;
const Rows rows{q, k, v, g, beta, y, head, value, key, key == 0};
const Rows kept{q, kept_k, kept_v, kept_g, kept_beta, y, head, value, key, false};
const int at = (head * Dv + value) * Dk + key;
recurrent_step<Rows>(kept, rows, StepOrder{order}, state_in + at, state_out + at);
"""
