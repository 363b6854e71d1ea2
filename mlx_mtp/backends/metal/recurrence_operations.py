"""The recurrences of a step that we have kernels for: the gated delta rule and Mamba2's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models import gated_delta as lm_gated_delta
from mlx_lm.models import ssm as lm_ssm

from mlx_mtp.backends.metal.gated_delta import (
    DeltaRows,
    gated_delta_step_kernel,
    gated_delta_step_ops,
)
from mlx_mtp.backends.metal.matmul import MAX_ROWS
from mlx_mtp.backends.metal.operation import CheckError, Kernel, Operation, is_near, same_bits
from mlx_mtp.backends.metal.recurrence import StepRuns
from mlx_mtp.backends.metal.ssm import SsmRows, SsmWeights, ssm_step_kernel, ssm_step_ops
from mlx_mtp.model.layout import StepLayout

_KEPT = 2
_LAYERS = 4


class DeltaKey(NamedTuple):
    """The shape of a gated delta rule: what a choice depends on."""

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    by_key: bool
    dtype: mx.Dtype

    @classmethod
    def of(cls, rows: DeltaRows) -> DeltaKey:
        """The key of a call with such rows."""
        return cls(
            *(rows.k.shape[1], rows.v.shape[1], rows.k.shape[2], rows.v.shape[2]),
            by_key=rows.g.ndim == 3,
            dtype=rows.q.dtype,
        )

    @property
    def name(self) -> str:
        """Such as ``gated delta 32/16 heads of 128x128 bfloat16`` (values x keys)."""
        gates = ", gates by key" if self.by_key else ""
        heads = f"{self.heads}/{self.key_heads} heads of {self.value_dim}x{self.key_dim}"
        return f"gated delta {heads}{gates} {_name(self.dtype)}"


class SsmKey(NamedTuple):
    """The shape of Mamba2's recurrence: what a choice depends on."""

    groups: int
    heads: int
    dims: int
    state_dim: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, rows: SsmRows) -> SsmKey:
        """The key of a call with such rows."""
        heads, dims = rows.x.shape[1:]
        groups, state_dim = rows.B.shape[1:]
        return cls(groups, heads, dims, state_dim, rows.x.dtype)

    @property
    def name(self) -> str:
        """Such as ``ssm 64/8 heads of 64x128 bfloat16`` (dimensions x state)."""
        heads = f"{self.heads}/{self.groups} heads of {self.dims}x{self.state_dim}"
        return f"ssm {heads} {_name(self.dtype)}"


Key = DeltaKey | SsmKey


class RecurrenceInputs(NamedTuple):
    """Arguments of ``gated_delta_step_kernel`` or, with weights, of ``ssm_step_kernel``."""

    rows: Any
    kept: Any
    runs: StepRuns
    state: mx.array
    weights: SsmWeights | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those that there are."""
        return self if self.weights is not None else self[:-1]


class RecurrenceOperation(Operation):
    """The rows of a step, after some kept rows of the step before, through one layer's state.

    Attributes:
        key: the shape.
        is_sequential: whether stock MLX may compute several rows in one call.
    """

    key: Any
    is_sequential: ClassVar[bool]
    row_axis = 0
    check_rows: Sequence[int] = (1, 2, 3, 5, 8, 16, MAX_ROWS)
    benchmark_rows = (1, 8, 16)
    decisive_rows = (8, 16)

    @abstractmethod
    def step(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
        """Our kernel's result ``[L, heads, D]``, and the state after the kept rows."""

    @abstractmethod
    def step_ops(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
        """The same in plain operations."""

    @abstractmethod
    def stock_call(
        self, inputs: RecurrenceInputs, rows: Any, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        """MLX's result ``[B, T, heads, D]`` of rows ``[B, T, ...]`` and the states after them."""

    @abstractmethod
    def draw(self, layout: StepLayout, *, num_kept: int, seed: int = 0) -> RecurrenceInputs:
        """Random inputs for the rows of a layout."""

    def ours(self, inputs: RecurrenceInputs, kernel: Kernel) -> mx.array:
        """Our kernel's result."""
        del kernel
        return self.step(inputs)[0]

    def stock(self, inputs: RecurrenceInputs) -> mx.array:
        """MLX's result: a call per ordinary row and one for all groups, after the kept rows."""
        rows, kept, runs, state = inputs[:4]
        state = state[None]
        kept_calls = 1 if self.is_sequential else runs.num_kept
        for part in np.array_split(np.arange(runs.num_kept), max(kept_calls, 1)):
            if len(part):
                _, state = self.stock_call(inputs, _batch(kept, part), state)
        results, states = [], []
        for row in range(runs.num_ordinary):
            y, state = self.stock_call(inputs, _batch(rows, np.array([row])), state)
            results.append(y[0])
            states.append(state)
        anchors = [t for t in range(runs.num_ordinary) if runs.groups[t] < runs.groups[t + 1]]
        if anchors:
            groups = [np.arange(runs.groups[t], runs.groups[t + 1]) for t in anchors]
            longest = max(map(len, groups))
            index = np.stack([np.pad(g, (0, longest - len(g)), mode="edge") for g in groups])
            batch = type(rows)(*(x[mx.array(index)] for x in rows))
            y, _ = self.stock_call(inputs, batch, mx.concatenate([states[t] for t in anchors]))
            results += [y[i, : len(group)] for i, group in enumerate(groups)]
        return mx.concatenate(results)

    def reference(self, inputs: RecurrenceInputs) -> mx.array:
        """The result in float32 operations."""
        return self.step_ops(_in_float32(inputs))[0]

    def check_inputs(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield inputs to compare with the reference."""
        for count in rows:
            yield f"{count} rows", self.draw(spread_layout(count), num_kept=_KEPT)

    def ordered_rows(self, num_rows: int) -> Callable[[int, int], Any]:
        """Draw rows; return a function that gives the inputs of rows ``first`` to ``last``."""
        layout = StepLayout(1, num_rows - 1, (0,) * num_rows)
        whole = self.draw(layout, num_kept=0)

        def select(first: int, last: int) -> RecurrenceInputs:
            rows = type(whole.rows)(*(x[first:last] for x in whole.rows))
            runs = StepRuns(num_kept=first, groups=(last - first,) * (last - first + 1))
            return whole._replace(rows=rows, kept=whole.rows, runs=runs)

        return select

    def benchmark_inputs(self, rows: int, context: int) -> list[Any]:
        """Rows for a few layers."""
        del context
        layout = spread_layout(rows)
        layers = [self.draw(layout, num_kept=_KEPT, seed=seed) for seed in range(_LAYERS)]
        mx.eval([(layer.rows, layer.kept, layer.state, layer.weights) for layer in layers])
        return layers

    def describe(self, kernel: Kernel) -> str:
        """What a message calls the kernel."""
        del kernel
        return "the recurrence"

    def check_kernel(self, kernel: Kernel) -> mx.array:
        """Check results, rows one by one, and the state that is stored."""
        y = super().check_kernel(kernel)
        whole = self.ordered_rows(_KEPT + 1)
        state, wanted = whole(_KEPT, _KEPT + 1), whole(0, _KEPT + 1)
        stored = self.step(state)[1]
        if not is_near(stored, self.step_ops(_in_float32(state))[1]):
            raise CheckError("the recurrence stores a wrong state")
        after = state._replace(runs=replace(state.runs, num_kept=0), state=stored)
        if not same_bits(self.step(after)[0][0], self.step(wanted)[0][_KEPT]):
            raise CheckError("the recurrence gives other bits after the state that it stores")
        return y


class GatedDeltaOperation(RecurrenceOperation):
    """The gated delta rule of one shape."""

    is_sequential = True

    def __init__(self, key: DeltaKey) -> None:
        self.key = key
        self.name = key.name

    def step(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
        """Our kernel's result ``[L, Hv, Dv]``, and the state after the kept rows."""
        return gated_delta_step_kernel(*inputs.arguments)

    def step_ops(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
        """The same in plain operations."""
        return gated_delta_step_ops(*inputs.arguments)

    def stock_call(
        self, inputs: RecurrenceInputs, rows: DeltaRows, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        """MLX's result ``[B, T, Hv, Dv]`` of rows ``[B, T, ...]`` and the states after them."""
        del inputs
        has_kernel = mx.metal.is_available() and mx.default_device() == mx.gpu
        call = lm_gated_delta.gated_delta_kernel if has_kernel else lm_gated_delta.gated_delta_ops
        return call(*rows, state)

    def draw(self, layout: StepLayout, *, num_kept: int, seed: int = 0) -> RecurrenceInputs:
        """Random inputs for the rows of a layout."""
        key = self.key
        seeds = iter(mx.random.split(mx.random.key(seed), 11))

        def rows(count: int) -> DeltaRows:
            q, k = (_normal((count, key.key_heads, key.key_dim), next(seeds)) for _ in range(2))
            gates = (count, key.heads, key.key_dim) if key.by_key else (count, key.heads)
            return DeltaRows(
                q=(q / key.key_dim).astype(key.dtype),
                k=(k / mx.linalg.norm(k, axis=-1, keepdims=True)).astype(key.dtype),
                v=_normal((count, key.heads, key.value_dim), next(seeds)).astype(key.dtype),
                g=mx.random.uniform(0.7, 1.0, gates, key=next(seeds)),
                beta=mx.random.uniform(shape=(count, key.heads), key=next(seeds)).astype(key.dtype),
            )

        state = _normal((key.heads, key.value_dim, key.key_dim), next(seeds))
        runs = StepRuns.of(layout, num_kept=num_kept)
        return RecurrenceInputs(rows(layout.num_rows), rows(max(num_kept, 1)), runs, state)


class SsmOperation(RecurrenceOperation):
    """Mamba2's recurrence of one shape."""

    is_sequential = False

    def __init__(self, key: SsmKey) -> None:
        self.key = key
        self.name = key.name

    def step(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
        """Our kernel's result ``[L, H, Dh]``, and the state after the kept rows."""
        return ssm_step_kernel(*inputs.arguments)

    def step_ops(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
        """The same in plain operations."""
        return ssm_step_ops(*inputs.arguments)

    def stock_call(
        self, inputs: RecurrenceInputs, rows: SsmRows, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        """MLX's result ``[B, T, H, Dh]`` of rows ``[B, T, ...]`` and the states after them."""
        assert inputs.weights is not None
        A_log, D = inputs.weights
        # mlx-lm computes step sizes itself; so does our layer, which is not benchmarked here.
        raw, no_bias = mx.log(mx.expm1(rows.dt)), mx.zeros_like(A_log)
        return lm_ssm.ssm_update(rows.x, A_log, rows.B, rows.C, D, raw, no_bias, state)

    def draw(self, layout: StepLayout, *, num_kept: int, seed: int = 0) -> RecurrenceInputs:
        """Random inputs for the rows of a layout."""
        key = self.key
        seeds = iter(mx.random.split(mx.random.key(seed), 11))

        def rows(count: int) -> SsmRows:
            size = (count, key.groups, key.state_dim)
            return SsmRows(
                x=_normal((count, key.heads, key.dims), next(seeds)).astype(key.dtype),
                B=_normal(size, next(seeds)).astype(key.dtype),
                C=_normal(size, next(seeds)).astype(key.dtype),
                dt=mx.random.uniform(0.01, 0.5, (count, key.heads), key=next(seeds)),
            )

        state = _normal((key.heads, key.dims, key.state_dim), next(seeds))
        weights = SsmWeights(
            A_log=mx.random.uniform(shape=(key.heads,), key=next(seeds)).astype(key.dtype),
            D=_normal((key.heads,), next(seeds)).astype(key.dtype),
        )
        runs = StepRuns.of(layout, num_kept=num_kept)
        return RecurrenceInputs(rows(layout.num_rows), rows(max(num_kept, 1)), runs, state, weights)


def spread_layout(rows: int) -> StepLayout:
    """A step of so many rows: a quarter are ordinary ones, each followed by a mask group."""
    ordinary = max(1, rows // 4)
    masks = rows - ordinary
    counts = [masks // ordinary + (t < masks % ordinary) for t in range(ordinary)]
    return StepLayout(1, ordinary - 1, tuple(counts))


def _batch(rows: Any, index: np.ndarray) -> Any:
    """Neighbouring rows ``[L, ...]`` as ``[1, T, ...]``."""
    return type(rows)(*(x[None, index[0] : index[-1] + 1] for x in rows))


def _in_float32(inputs: RecurrenceInputs) -> RecurrenceInputs:
    def cast(arrays: Any) -> Any:
        return None if arrays is None else type(arrays)(*(x.astype(mx.float32) for x in arrays))

    return inputs._replace(
        rows=cast(inputs.rows), kept=cast(inputs.kept), weights=cast(inputs.weights)
    )


def _normal(shape: tuple[int, ...], key: mx.array) -> mx.array:
    return mx.random.normal(shape, key=key)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
