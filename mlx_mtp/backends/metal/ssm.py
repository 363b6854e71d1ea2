"""Mamba2's recurrence over the rows of a step, which reads its state once and writes it once.

The source is in ``metal/ssm_step.metal``; sums are those of mlx-lm's kernel of one row, so a row
has the bits that it has alone.  mlx-lm computes several rows in chunks, which gives other bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.matmul import DTYPES, MAX_ROWS, Launch
from mlx_mtp.backends.metal.recurrence import StepRuns, fill_up, run_rows

MAX_STATE_DIM = 256  # more elements of the state would not stay in a lane's registers
_SIMDGROUPS = 8


class SsmRows(NamedTuple):
    """Inputs of Mamba2's recurrence.

    Attributes:
        x: ``[L, H, Dh]``.
        B: ``[L, G, Ds]``; H / G heads share a group.
        C: ``[L, G, Ds]``.
        dt: step sizes, biased, passed through softplus and limited, float32 ``[L, H]``.
    """

    x: mx.array
    B: mx.array
    C: mx.array
    dt: mx.array

    def rows(self, first: int, last: int) -> SsmRows:
        """Rows ``first`` to ``last``."""
        return SsmRows(*(x[first:last] for x in self))


class SsmWeights(NamedTuple):
    """Weights of Mamba2's recurrence: ``A_log`` and ``D``, ``[H]`` each."""

    A_log: mx.array
    D: mx.array


def takes(rows: SsmRows, weights: SsmWeights, state: mx.array) -> bool:
    """Whether there is a kernel for these arguments of ``ssm_step_kernel``."""
    num_rows, heads, dims = rows.x.shape
    groups, state_dim = rows.B.shape[1:]
    one_type = rows.x.dtype == rows.B.dtype == rows.C.dtype and rows.x.dtype in DTYPES
    floats = rows.dt.dtype == state.dtype == mx.float32
    known = all(x.dtype in DTYPES for x in weights)
    shapes = (
        state.shape == (heads, dims, state_dim)
        and heads % groups == 0
        and state_dim % 32 == 0
        and state_dim <= MAX_STATE_DIM
    )
    return one_type and floats and known and shapes and num_rows <= MAX_ROWS


def ssm_step_ops(
    rows: SsmRows, kept: SsmRows, runs: StepRuns, state: mx.array, weights: SsmWeights
) -> tuple[mx.array, mx.array]:
    """Run the rows of a step one after another in plain operations.

    Args:
        rows: of the step, ordinary ones first.
        kept: of the last step, ``runs.num_kept`` of which are run again first; C is not read.
        runs: which rows follow which.
        state: ``[H, Dh, Ds]`` before the kept rows.
        weights: of the layer.

    Returns:
        ``[L, H, Dh]``, and the state after the kept rows.
    """

    def step(rows: SsmRows, row: int, state: mx.array) -> tuple[mx.array, mx.array]:
        return _row_ops(rows, row, state, weights)

    return run_rows(step, rows, kept, runs, state)


def _row_ops(
    rows: SsmRows, row: int, state: mx.array, weights: SsmWeights
) -> tuple[mx.array, mx.array]:
    """One row: ``[H, Dh]`` and the state after it."""
    repeats = rows.x.shape[1] // rows.B.shape[1]
    B, C = (mx.repeat(x[row], repeats, axis=0)[:, None] for x in (rows.B, rows.C))
    x, dt = rows.x[row].astype(mx.float32), rows.dt[row][:, None]
    decay = mx.exp(-mx.exp(weights.A_log.astype(mx.float32))[:, None] * dt)
    state = state * decay[..., None] + (x * dt)[..., None] * B
    y = (state * C).sum(-1) + x * weights.D[:, None]
    return y.astype(rows.x.dtype), state


def ssm_step_launch(
    rows: SsmRows, kept: SsmRows, runs: StepRuns, state: mx.array, weights: SsmWeights
) -> Launch:
    """Describe how the kernel runs the rows; arguments as in ``ssm_step_ops``.

    Without ordinary rows nothing but the state is computed.

    Returns:
        A launch whose outputs are ``[L, H, Dh]`` and the state after the kept rows.
    """
    num_rows, heads, dims = rows.x.shape
    groups, state_dim = rows.B.shape[1:]
    template: dict[str, Any] = {
        "T": rows.x.dtype,
        "Dh": dims,
        "Ds": state_dim,
        "H": heads,
        "G": heads // groups,
    }
    return Launch(
        name="mlx_mtp_ssm_step",
        source=_CALL,
        inputs={
            **{name: fill_up(x) for name, x in rows._asdict().items()},
            **{f"kept_{name}": fill_up(x) for name, x in kept._asdict().items() if name != "C"},
            "A_log": fill_up(weights.A_log),
            "D": fill_up(weights.D),
            "order": runs.order(),
            "state_in": state,
        },
        template=template,
        grid=(32, dims, heads),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shape=(num_rows, heads, dims),
        output_dtype=rows.x.dtype,
        more_outputs={"state_out": (state.shape, mx.float32)},
    )


def ssm_step_kernel(
    rows: SsmRows, kept: SsmRows, runs: StepRuns, state: mx.array, weights: SsmWeights
) -> tuple[mx.array, mx.array]:
    """Run the rows of a step on Metal; arguments and result as in ``ssm_step_ops``.

    Raises:
        RuntimeError: see ``matmul.run_all``.
    """
    y, stored = kernels.run_all(ssm_step_launch(rows, kept, runs, state, weights))
    return y, stored


_CALL = """typedef SsmRows<SsmShape<T, Dh, Ds, H, G>> Rows;
const int lane = thread_index_in_simdgroup;
const int head = thread_position_in_grid.z;
const int dim = thread_position_in_grid.y;
const int state_dim = lane * Rows::each;
const float decay_rate = -fast::exp(static_cast<float>(A_log[head]));
const float skip = static_cast<float>(D[head]);
const Rows rows{x, B, C, dt, y, decay_rate, skip, head, dim, state_dim, lane == 0};
const Rows kept{kept_x, kept_B, C, kept_dt, y, decay_rate, skip, head, dim, state_dim, false};
const int at = (head * Dh + dim) * Ds + state_dim;
recurrent_step<Rows>(kept, rows, StepOrder{order}, state_in + at, state_out + at);
"""
