"""Step costs on this machine: measured on request, learned from real steps, stored for each model.

No command measures before it answers.  A model without a good measurement starts from a guess for
its kind of device; what the planner then learns from the steps that run is stored after answers and
used by the next start.  ``mlx-mtp tune`` and ``mlx-mtp benchmark`` measure.

Measured are the decoder's own steps: verification alone gives the forward by its rows, and steps
with as many rows, some of them masks, give the cost of drafting.  Wide steps are left out as soon
as they cost more than they could ever gain.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.backends.device import gpu_info, gpu_marks, machine_name
from mlx_mtp.backends.metal.choice import SWITCH
from mlx_mtp.calibration.per_model import PerModel
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import (
    CPU_GUESS,
    GPU_GUESS,
    SLOW_CPU_GUESS,
    Corrections,
    CostCurve,
    LiveCosts,
)
from mlx_mtp.planning.estimates import Estimates
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS
from mlx_mtp.planning.plan import HEADS
from mlx_mtp.storage.keyed_cache import KeyedCache
from mlx_mtp.storage.package import package_version

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 25, 32, 33, 48, 64, 81, 96)
CONTEXTS = (64, 1024)
ROUNDS = 2
STORE_STEPS = 16  # new steps after which it is worth storing what they taught
_CORRECTIONS = "corrections"

SPECULATIONS: PerModel[Speculation] = PerModel()
"""What the planner knows about each loaded model."""

OnStatus = Callable[[str], None]


def measure_costs(
    model: MTPModel,
    *,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    on_status: OnStatus = lambda text: None,
) -> CostCurve:
    """Time steps on the real model; takes a few seconds.

    Args:
        model: with its adapter; without one only verification is timed.
        contexts: cache lengths to measure at, in ids; at most half of the model's context, so
            that steps fit into the other half.
        rounds: runs per step after a warm-up run; the fastest counts.  Disturbed steps are
            repeated.
        on_status: called with a line of text about the current work.
    """
    from mlx_mtp.calibration.step_timer import StepTimer

    k, half = model.num_draft_tokens, max((model.max_context or 2**62) // 2, 1)
    contexts = sorted({min(context, half) for context in contexts})
    useful = max((k + 1) ** 2, MAX_LOOKUP_TOKENS + 1)
    rows = [count for count in ROWS if count <= min(useful, half)]
    lines, disturbed = [], False
    timer = StepTimer(model, contexts[0])
    draft_ms = timer.draft_ms(rounds)
    for context in contexts:
        timer = timer if context == contexts[0] else StepTimer(model, context)
        on_status(f"Measuring step costs with {context} ids in the cache ...")
        line = timer.forward_ms(rows, draft_ms, rounds)
        rows = rows[: len(line)]
        lines.append(line)
        disturbed |= timer.disturbed
    return CostCurve(
        rows=tuple(rows),
        contexts=tuple(contexts),
        forward_ms=tuple(tuple(line[: len(rows)]) for line in lines),
        draft_ms=tuple(draft_ms),
        source=f"measured {time.strftime('%Y-%m-%d')} on {machine_name(gpu_info())}",
        disturbed=disturbed,
    )


def calibrate(
    model: MTPModel, *, again: bool = False, on_status: OnStatus = lambda text: None
) -> CostCurve:
    """Measure the step costs of a model on this machine, store them, and plan with them.

    A disturbed measurement does not raise the times of an earlier one.

    Args:
        model: with its adapter.
        again: measure even if there is an undisturbed measurement.
        on_status: called with a line of text about the current work.
    """
    earlier = measured_costs(model)
    if earlier is not None and not again and not earlier.disturbed:
        return earlier
    curve = measure_costs(model, on_status=on_status)
    if curve.disturbed and earlier is not None:
        curve = curve.least(earlier)
    _cache(model).write(curve.to_dict())
    if known := SPECULATIONS.get(model):
        known.replace_costs(guessed_costs() if curve.disturbed else curve)
    return curve


def measured_costs(model: MTPModel) -> CostCurve | None:
    """Return the stored measurement for this model on this machine, disturbed or not.

    Measurements of another machine or version do not count, even if their file was copied here.
    """
    stored = _cache(model).read(_decode)
    return None if stored is None or stored.curve.is_guess else stored.curve


def speculation_for(model: MTPModel) -> Speculation:
    """Return what the planner knows about a model: one object for the lifetime of the model.

    It starts from the stored measurement and corrections, or from a guess if there is none or the
    measurement was disturbed.
    """
    known = SPECULATIONS.get(model)
    if known is None:
        stored = _cache(model).read(_decode)
        if stored is None or stored.curve.disturbed:
            stored = LiveCosts(guessed_costs())
        shares = model.config.acceptance if model.config else ()
        k = model.num_draft_tokens
        prior = Acceptance.from_shares(shares) if shares else Acceptance.unknown(k)
        known = Speculation(stored, prior, num_stored_steps=stored.corrections.num_steps)
        if model.heads is not None and (shares := model.heads.config.acceptance):
            known.drafters[HEADS] = Estimates(Acceptance.from_shares(shares))
        SPECULATIONS.set(model, known)
    return known


def store_learned(model: MTPModel) -> None:
    """Store what the last answers taught about step costs; call it after an answer.

    A measurement that they disproved is discarded in favour of a guess, which learns quickly.  If
    another process has measured meanwhile, its measurement is used from now on.
    """
    known = SPECULATIONS.get(model)
    if known is None:
        return
    num_new_steps = known.costs.corrections.num_steps - known.num_stored_steps
    if num_new_steps < STORE_STEPS and not known.costs.is_disproved:
        return
    cache, curve = _cache(model), known.costs.curve
    stored = cache.read(_decode)
    if stored and stored.curve != curve and not (stored.curve.is_guess or stored.curve.disturbed):
        known.replace_costs(stored.curve)
        return
    if known.costs.is_disproved:
        known.replace_costs(guessed_costs())
    corrections = known.costs.corrections
    known.num_stored_steps = corrections.num_steps
    cache.write(known.costs.curve.to_dict() | {_CORRECTIONS: corrections.to_dict()})


def guessed_costs() -> CostCurve:
    """Return the guess for the device that models run on."""
    if mx.default_device().type == mx.gpu:
        return GPU_GUESS
    return SLOW_CPU_GUESS if BLAS == "reference" else CPU_GUESS


def _decode(values: Mapping[str, Any]) -> LiveCosts:
    """Costs from a cache file; corrections of a guess that has changed since are dropped."""
    curve, corrections = CostCurve.from_dict(values), None
    if _CORRECTIONS in values and not (curve.is_guess and curve != guessed_costs()):
        corrections = Corrections.from_dict(values[_CORRECTIONS])
    return LiveCosts(guessed_costs() if curve.is_guess else curve, corrections=corrections)


def curve_lines(curve: CostCurve) -> list[str]:
    """Format a curve as lines of a table."""
    heads = [f"{context} ids in the cache" for context in curve.contexts]
    lines = ["rows  " + "  ".join(f"{head:>26}" for head in heads)]
    for index, rows in enumerate(curve.rows):
        times = [(line[index], line[index] / line[0]) for line in curve.forward_ms]
        cells = [f"{ms:8.1f} ms  {ratio:5.2f} x" for ms, ratio in times]
        lines.append(f"{rows:4d}  " + "  ".join(f"{cell:>26}" for cell in cells))
    if curve.num_draft_tokens:
        shares = ", ".join(f"{size}: {ms:.1f}" for size, ms in enumerate(curve.draft_ms) if size)
        lines += ["", f"time added by drafting, in ms, by number of masks: {shares}"]
    return [*lines, "", curve.doubt] if curve.disturbed else lines


def _cache(model: MTPModel) -> KeyedCache:
    """The cache entry for this model, this machine and these versions."""
    machine = gpu_marks(gpu_info())
    machine += [platform.platform(), str(os.cpu_count()), os.environ.get("OMP_NUM_THREADS", "")]
    packages = [package_version(), version("mlx"), BLAS]
    weights = [
        f"{name} {tuple(value.shape)} {value.dtype}"
        for name, value in cast("list[tuple[str, mx.array]]", tree_flatten(model.base.parameters()))
    ]
    # Without mask tokens nothing is known about the cost of drafting with them.
    masks = [] if model.num_draft_tokens else ["no mask tokens"]
    if model.frequent is not None:
        masks.append(f"{model.frequent.ids.size} frequent tokens")
    return KeyedCache("costs", [*machine, *packages, os.environ.get(SWITCH, ""), *weights, *masks])
