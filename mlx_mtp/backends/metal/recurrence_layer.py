"""Recurrent layers that run the rows of a step with our kernels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as lm_cache
from mlx_lm.models.gated_delta import compute_g, compute_lower_bound_g, gated_delta_update
from mlx_lm.models.ssm import compute_dt, ssm_update

from mlx_mtp.backends.metal import gated_delta, ssm
from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.gated_delta import DeltaRows, gated_delta_step_kernel
from mlx_mtp.backends.metal.recurrence import StepRuns
from mlx_mtp.backends.metal.recurrence_operations import (
    DeltaKey,
    GatedDeltaOperation,
    Key,
    RecurrenceInputs,
    RecurrenceOperation,
    SsmKey,
    SsmOperation,
)
from mlx_mtp.backends.metal.ssm import SsmRows, SsmWeights, ssm_step_kernel
from mlx_mtp.model.layout import StepLayout, plain_layout
from mlx_mtp.model.recurrence import RecurrenceCall, RecurrenceSeam, Rows, inject_recurrence

_FUNCTIONS = {"gated_delta_update": gated_delta_update, "ssm_update": ssm_update}


class KernelRecurrence:
    """Recurrences with our kernels where these were chosen; see ``model.recurrence``."""

    def __init__(self, choices: Mapping[Key, KernelChoice]) -> None:
        self.choices = dict(choices)

    def __call__(
        self, call: RecurrenceCall, layout: StepLayout, state: mx.array | None, kept: Rows | None
    ) -> tuple[mx.array, mx.array] | None:
        """Run a step; None leaves it to stock MLX."""
        inputs = recurrence_inputs(call, layout, state, kept)
        if inputs is None:
            return None
        choice = self.choices.get(_key(inputs))
        if choice is None or not choice.ours:
            return None
        y, stored = _step(inputs)
        return y[None], stored[None]


def recurrence_inputs(
    call: RecurrenceCall, layout: StepLayout, state: mx.array | None, kept: Rows | None
) -> RecurrenceInputs | None:
    """What a kernel takes of the arguments of ``StepRecurrence``; None where there is no kernel."""
    if call.name not in _FUNCTIONS:
        return None
    parameters = inspect.signature(_FUNCTIONS[call.name]).parameters
    constants = {name: each.default for name, each in parameters.items()} | dict(call.constants)
    is_delta = call.name == "gated_delta_update"
    if constants["mask"] is not None or (is_delta and not constants["use_kernel"]):
        return None
    prepare = _delta_rows if is_delta else _ssm_rows
    rows = prepare(call.rows, constants)
    kept_rows = rows if kept is None else prepare(kept, constants)
    num_kept = 0 if kept is None else kept_rows[0].shape[0]
    runs = StepRuns.of(layout, num_kept=num_kept)
    if isinstance(rows, DeltaRows):
        shape = (*rows.v.shape[1:], rows.k.shape[2])
        before = mx.zeros(shape) if state is None else state[0]
        found = RecurrenceInputs(rows, kept_rows, runs, before)
        return found if gated_delta.takes(rows, before) else None
    shape = (*rows.x.shape[1:], rows.B.shape[2])
    before = mx.zeros(shape) if state is None else state[0]
    weights = SsmWeights(A_log=constants["A_log"], D=constants["D"])
    return (
        RecurrenceInputs(rows, kept_rows, runs, before, weights)
        if ssm.takes(rows, weights, before)
        else None
    )


def use_recurrence(base: nn.Module, choices: Mapping[Key, KernelChoice]) -> bool:
    """Let the recurrent layers of a model use our kernels where they were chosen, in place.

    Returns:
        Whether any does.
    """
    if not any(choice.ours for choice in choices.values()):
        return False
    inject_recurrence(base, KernelRecurrence(choices))
    return True


def recurrence_operations(base: nn.Module) -> list[RecurrenceOperation]:
    """Find the shapes for which a model calls a recurrence and for which there is a kernel.

    The model, whose mixers have their seams, is called with one token; nothing is evaluated.
    """
    if not any(isinstance(module, RecurrenceSeam) for _, module in base.named_modules()):
        return []
    keys: dict[Key, None] = {}
    caches = [_observed(cache, keys) for cache in lm_cache.make_prompt_cache(base)]
    try:
        base(mx.array([[0]]), cache=caches)
    except Exception:  # a model with another signature keeps its recurrence
        return []
    return [
        GatedDeltaOperation(key) if isinstance(key, DeltaKey) else SsmOperation(key) for key in keys
    ]


class _Observer(lm_cache.ArraysCache):
    """A cache that notes the shapes of the recurrences that ask it."""

    def __init__(self, size: int, keys: dict[Key, None]) -> None:
        super().__init__(size)
        self._keys = keys

    def convolve(self, slot: int, conv: Any, x: mx.array) -> mx.array:
        """Convolve all rows."""
        del slot
        return conv(x)

    def recur(self, call: RecurrenceCall, step: Any) -> tuple[mx.array, mx.array | None]:
        """Run all rows with mlx-lm's function."""
        del step
        inputs = recurrence_inputs(call, plain_layout(num_pending=call.num_rows), None, None)
        if inputs is not None:
            self._keys[_key(inputs)] = None
        return call.run(None)


def _observed(cache: Any, keys: dict[Key, None]) -> Any:
    if isinstance(cache, lm_cache.CacheList):
        return lm_cache.CacheList(*(_observed(each, keys) for each in cache.caches))
    return _Observer(len(cache.cache), keys) if isinstance(cache, lm_cache.ArraysCache) else cache


def _key(inputs: RecurrenceInputs) -> Key:
    return (DeltaKey if inputs.weights is None else SsmKey).of(inputs.rows)


def _step(inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
    step = gated_delta_step_kernel if inputs.weights is None else ssm_step_kernel
    return step(*inputs.arguments)


def _delta_rows(rows: Rows, constants: Mapping[str, Any]) -> DeltaRows:
    """Rows of ``gated_delta_update``, with the gates that it computes."""
    beta = mx.sigmoid(rows["b"])
    if constants["allow_neg_eigval"]:
        beta = beta * 2.0
    arguments = (constants["A_log"], rows["a"], constants["dt_bias"])
    bound = constants["lower_bound"]
    g = compute_g(*arguments) if bound is None else compute_lower_bound_g(*arguments, bound)
    return DeltaRows(*(x[0] for x in (rows["q"], rows["k"], rows["v"], g, beta)))


def _ssm_rows(rows: Rows, constants: Mapping[str, Any]) -> SsmRows:
    """Rows of ``ssm_update``, with the step sizes that it computes."""
    dt = compute_dt(rows["dt"], constants["dt_bias"], constants["time_step_limit"])
    return SsmRows(*(x[0] for x in (rows["hidden_states"], rows["B"], rows["C"], dt)))
