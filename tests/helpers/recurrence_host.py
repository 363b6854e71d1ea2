"""Recurrent steps on the CPU executor: problems, their answers in float64, mlx-lm's own kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gated_delta, ssm

from mlx_mtp.backends.metal.gated_delta import DeltaRows, gated_delta_step_launch
from mlx_mtp.backends.metal.matmul import Launch
from mlx_mtp.backends.metal.recurrence import StepRuns
from mlx_mtp.backends.metal.ssm import SsmRows, SsmWeights, ssm_step_launch
from mlx_mtp.model.layout import StepLayout, linear_layout, plain_layout, quadratic_layout
from tests.helpers.kernel_host import compiled, float64, from_numpy, run_launch_all, to_numpy
from tests.metal_host import Report
from tests.metal_host.capture import kernel_text

LAYOUTS: dict[str, StepLayout] = {
    "plain": plain_layout(),
    "linear": linear_layout(num_pending=2, num_draft_tokens=2, num_masks=3),
    "quadratic": quadratic_layout(num_pending=1, num_draft_tokens=3, num_masks=2),
    "ragged": StepLayout(2, 3, (2, 0, 3, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A step of the gated delta rule.

    Attributes:
        kept: rows of the step before, the first of which were accepted.
    """

    rows: DeltaRows
    kept: DeltaRows
    runs: StepRuns
    state: mx.array

    def launch(self) -> Launch:
        return gated_delta_step_launch(self.rows, self.kept, self.runs, self.state)

    def run(self, **options: Any) -> tuple[mx.array, mx.array, Report]:
        """Ours on the executor: the result, the state that is stored, what the executor saw."""
        (y, state), report = run_launch_all(self.launch(), **options)
        return y, state, report

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """The result and the state in float64."""
        return _exact(self, _delta_row)

    def stock(self, rows: DeltaRows, row: int, state: mx.array) -> tuple[mx.array, mx.array]:
        """One row by mlx-lm's kernel: its result ``[Hv, Dv]`` and the state after it."""
        q, k, v, g, beta = (x[row : row + 1][None] for x in rows)
        with pytest.MonkeyPatch.context() as patch:
            _make_kernels(patch)

            inputs = (q, k, v, g, beta, state[None])
            return _run_stock(gated_delta.gated_delta_kernel, inputs, (v.shape, q.dtype), skip=1)


@dataclass(frozen=True, kw_only=True)
class Ssm:
    """A step of Mamba2."""

    rows: SsmRows
    kept: SsmRows
    runs: StepRuns
    state: mx.array
    weights: SsmWeights = field(repr=False)

    def launch(self) -> Launch:
        return ssm_step_launch(self.rows, self.kept, self.runs, self.state, self.weights)

    def run(self, **options: Any) -> tuple[mx.array, mx.array, Report]:
        """Ours on the executor: the result, the state that is stored, what the executor saw."""
        (y, state), report = run_launch_all(self.launch(), **options)
        return y, state, report

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """The result and the state in float64."""
        rate = -np.exp(float64(self.weights.A_log))
        skip = float64(self.weights.D)

        def row(x, B, C, dt, state):
            repeats = x.shape[0] // B.shape[0]
            B, C = (np.repeat(each, repeats, axis=0)[:, None] for each in (B, C))
            decay = np.exp(rate * dt)[:, None, None]
            state = state * decay + (x * dt[:, None])[..., None] * B
            return (state * C).sum(-1) + x * skip[:, None], state

        return _exact(self, row)

    def stock(self, rows: SsmRows, row: int, state: mx.array) -> tuple[mx.array, mx.array]:
        """One row by mlx-lm's kernel: its result ``[H, Dh]`` and the state after it."""
        x, B, C, dt = (each[row : row + 1][None] for each in rows)
        with pytest.MonkeyPatch.context() as patch:
            _make_kernels(patch)
            patch.setattr(ssm, "compute_dt", lambda dt, bias, limit: dt)

            def call(x, A_log, B, C, D, dt, state):
                return ssm.ssm_update_kernel(x, A_log, B, C, D, dt, dt, state, (0.0, 1.0))

            inputs = (x, self.weights.A_log, B, C, self.weights.D, dt, state[None])
            return _run_stock(call, inputs, (x.shape, x.dtype))


def delta(
    layout: StepLayout | str = "quadratic",
    *,
    num_kept: int = 2,
    key_dim: int = 128,
    value_dim: int = 16,
    key_heads: int = 2,
    heads: int = 4,
    by_key: bool = False,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Delta:
    """A random step after a random one of four rows."""
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    rng = np.random.default_rng(seed)

    def rows(count: int) -> DeltaRows:
        k = rng.standard_normal((count, key_heads, key_dim))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        gates = (count, heads, key_dim) if by_key else (count, heads)
        return DeltaRows(
            q=_array(0.1 * rng.standard_normal(k.shape), dtype),
            k=_array(k, dtype),
            v=_array(rng.standard_normal((count, heads, value_dim)), dtype),
            g=_array(rng.uniform(0.7, 1, gates), mx.float32),
            beta=_array(rng.uniform(0, 1, (count, heads)), dtype),
        )

    state = _array(rng.standard_normal((heads, value_dim, key_dim)), mx.float32)
    runs = StepRuns.of(layout, num_kept=num_kept)
    return Delta(rows=rows(layout.num_rows), kept=rows(4), runs=runs, state=state)


def mamba(
    layout: StepLayout | str = "quadratic",
    *,
    num_kept: int = 2,
    dims: int = 16,
    state_dim: int = 64,
    heads: int = 4,
    groups: int = 2,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Ssm:
    """A random step after a random one of four rows."""
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    rng = np.random.default_rng(seed)

    def rows(count: int) -> SsmRows:
        normal = rng.standard_normal
        return SsmRows(
            x=_array(normal((count, heads, dims)), dtype),
            B=_array(normal((count, groups, state_dim)), dtype),
            C=_array(normal((count, groups, state_dim)), dtype),
            dt=_array(rng.uniform(0.01, 0.5, (count, heads)), mx.float32),
        )

    weights = SsmWeights(
        A_log=_array(rng.uniform(0, 1, heads), dtype), D=_array(rng.standard_normal(heads), dtype)
    )
    state = _array(rng.standard_normal((heads, dims, state_dim)), mx.float32)
    runs = StepRuns.of(layout, num_kept=num_kept)
    return Ssm(rows=rows(layout.num_rows), kept=rows(4), runs=runs, state=state, weights=weights)


def _array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(values.astype(np.float32)).astype(dtype)


def _delta_row(q, k, v, g, beta, state):
    repeats = v.shape[0] // k.shape[0]
    q, k = (np.repeat(each, repeats, axis=0)[:, None] for each in (q, k))
    state = state * (g[:, None, None] if g.ndim == 1 else g[:, None])
    change = (v - (state * k).sum(-1)) * beta[:, None]
    state = state + k * change[..., None]
    return (state * q).sum(-1), state


def _exact(problem: Any, row: Any) -> tuple[np.ndarray, np.ndarray]:
    rows, kept = ([float64(x) for x in each] for each in (problem.rows, problem.kept))
    state, runs = float64(problem.state), problem.runs
    for index in range(runs.num_kept):
        _, state = row(*(x[index] for x in kept), state)
    stored, found = state, {}
    for t in range(runs.num_ordinary):
        found[t], state = row(*(x[t] for x in rows), state)
        branch = state
        for mask in range(runs.groups[t], runs.groups[t + 1]):
            found[mask], branch = row(*(x[mask] for x in rows), branch)
    return np.stack([found[index] for index in sorted(found)]), stored


def _make_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let mlx-lm make its kernels, which are traced and not run."""
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(
        gated_delta, "_gated_delta_kernel_packed", gated_delta._make_gated_delta_packed_kernel()
    )
    for name, options in (("", {}), ("_vec", {"vectorized": True})):
        kernel = gated_delta._make_gated_delta_kernel(**options)
        patch.setattr(gated_delta, f"_gated_delta_kernel{name}", kernel)
    patch.setattr(ssm, "_ssm_kernel", ssm.make_ssm_kernel())


def _run_stock(
    call: Any, inputs: tuple[mx.array, ...], result: tuple[Any, mx.Dtype], *, skip: int = 0
) -> tuple[mx.array, mx.array]:
    """The two results of a kernel of mlx-lm, which takes the number of rows last if ``skip``."""
    text = kernel_text(call, *inputs)
    arrays = [to_numpy(x) for x in inputs] + [np.array(1, np.int32)] * skip
    shape, dtype = result
    y = np.array(to_numpy(mx.zeros(shape, dtype=dtype)))
    state = np.zeros(inputs[-1].shape, np.float32)
    buffers = text.buffers(arrays, [y, state])
    kernel = compiled(text.source, text.name, text.template_args, text.include, "fast")
    kernel(text.grid, text.threadgroup, buffers, uninit=(max(buffers) - 1, max(buffers)))
    return from_numpy(y, dtype)[0, 0], mx.array(state[0])
