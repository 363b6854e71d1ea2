"""Measure what a step costs here, and remember it by machine and model.

Measured are the decoder's own steps: verifying alone gives the forward by its rows, and steps with
as many rows but some of them masks give what drafting adds.  Wide steps are left out as soon as
they cost more than they could ever bring.

What was measured on a busy machine must not stick: a measurement that was disturbed, or that
decoding has disproved, is kept as such and repeated the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.backends.device import gpu_info, gpu_marks, machine_name
from mlx_mtp.backends.metal.choice import SWITCH
from mlx_mtp.calibration.per_model import PerModel
from mlx_mtp.calibration.step_timer import StepBench
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import UNKNOWN, Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import UNMEASURED, CostCurve, LiveCosts
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.storage.package import package_version
from mlx_mtp.storage.paths import cache_dir

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 25, 32, 33, 48, 64, 81, 96)
CONTEXTS = (64, 1024)
ROUNDS = 2
MOST_MEASUREMENTS = 3  # of a machine that is busy each time

SPECULATIONS: PerModel[Speculation] = PerModel()
"""What the planner knows of each loaded model."""

Say = Callable[[str], None]


def measure_costs(
    model: MTPModel,
    *,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = ROUNDS,
    say: Say = lambda text: None,
) -> CostCurve:
    """Time steps on the real model; a few seconds.

    Args:
        model: with its adapter; without one only verification is timed.
        contexts: ids in the cache meanwhile; half of the model's context at most, so that steps
            fit into the other half.
        rounds: how often each step is run; the least time counts, after one run to warm up.
            Disturbed steps are run again.
        say: called with a line about what is going on.
    """
    k, half = model.num_draft_tokens, max((model.max_context or 2**62) // 2, 1)
    contexts = sorted({min(each, half) for each in contexts})
    useful = max((k + 1) ** 2, MAX_LOOKUP_TOKENS + 1)
    rows = [each for each in ROWS if each <= min(useful, half)]
    lines, disturbed = [], False
    bench = StepBench(model, contexts[0])
    draft_ms = bench.draft_ms(rounds)
    for context in contexts:
        bench = bench if context == contexts[0] else StepBench(model, context)
        say(f"Measuring what rows cost at {context} ids ...")
        line = bench.forward_ms(rows, draft_ms, rounds)
        rows = rows[: len(line)]
        lines.append(line)
        disturbed |= bench.disturbed
    return CostCurve(
        rows=tuple(rows),
        contexts=tuple(contexts),
        forward_ms=tuple(tuple(line[: len(rows)]) for line in lines),
        draft_ms=tuple(draft_ms),
        source=f"measured {time.strftime('%Y-%m-%d')} on {machine_name(gpu_info())}",
        disturbed=disturbed,
    )


def kept_costs(
    model: MTPModel, *, measure: bool = True, again: bool = False, say: Say = lambda text: None
) -> CostCurve | None:
    """The cost curve of this model on this machine: the one that is kept, or a new one.

    A kept one that was disturbed is measured again, a few times at most.  Of two disturbed ones the
    smaller times count.

    Args:
        model: with its adapter.
        measure: whether to measure where none is kept, or a disturbed one; otherwise that one or
            None is returned.  What another machine or version measured does not count, even if its
            file was copied here.
        again: measure even so.
        say: called with a line while it measures.
    """
    digest = _digest(model)
    kept = _read(digest)
    doubted = kept is None or (kept.disturbed and kept.num_measurements < MOST_MEASUREMENTS)
    if not (again or (measure and doubted)):
        return kept
    if kept is not None and not again:
        say("The machine was busy when costs were measured: measuring again ...")
    curve = measure_costs(model, say=say)
    if kept is not None and curve.disturbed:
        count = 1 if again else kept.num_measurements + 1
        curve = replace(curve.least(kept), num_measurements=count)
    _write(digest, curve)
    return curve


def doubt_disproved(model: MTPModel) -> bool:
    """Mark the kept curve as disturbed if decoding has disproved it; call it behind an answer.

    Args:
        model: whose planner knows.

    Returns:
        Whether it was disproved; it is measured once more at the next start, or before the next
        answer where measuring was allowed.
    """
    known = SPECULATIONS.get(model)
    if known is None or not known.costs.is_disproved or known.costs.curve is UNMEASURED:
        return False
    curve = known.costs.curve
    if not curve.disturbed or curve.num_measurements >= MOST_MEASUREMENTS:
        digest = _digest(model)
        count = min(curve.num_measurements, MOST_MEASUREMENTS - 1)
        known.costs.curve = replace(curve, disturbed=True, num_measurements=count)
        if _read(digest) == curve:  # and not another process's, who measured since
            _write(digest, known.costs.curve)
    return True


def speculation_for(
    model: MTPModel, *, measure: bool = True, say: Say = lambda text: None
) -> Speculation:
    """What the planner knows of a model on this machine; one object as long as the model lives.

    Where measuring was allowed once, a curve that decoding has disproved is measured again.

    Args:
        model: with its adapter.
        measure: whether to measure what rows cost if that was not done here before (seconds);
            otherwise it is guessed.
        say: called with a line while it measures.
    """
    known = SPECULATIONS.get(model)
    if known is None or (measure and known.costs.curve is UNMEASURED):
        curve = kept_costs(model, measure=measure, say=say) or UNMEASURED
        shares = model.config.acceptance if model.config else ()
        k = model.num_draft_tokens
        prior = Acceptance.from_shares(shares) if shares else Acceptance([UNKNOWN] * max(k, 1))
        known = Speculation(LiveCosts(curve), prior)
        SPECULATIONS.set(model, known)
    known.may_measure |= measure
    if known.may_measure and known.num_remeasured < MOST_MEASUREMENTS and doubt_disproved(model):
        known.take_costs(kept_costs(model, say=say) or known.costs.curve)
    return known


def _read(digest: str) -> CostCurve | None:
    """The kept curve, if it was made for this machine, model and versions."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(_path(digest).read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("made_for") == digest:
            return CostCurve.from_dict(values)
    return None


def _write(digest: str, curve: CostCurve) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is measured for again
        values = {"made_for": digest} | curve.to_dict()
        write_atomically(_path(digest), json.dumps(values, indent=2) + "\n")


def _path(digest: str) -> Path:
    return cache_dir() / "costs" / f"{digest}.json"


def curve_lines(curve: CostCurve) -> list[str]:
    """A curve as a table for people."""
    heads = [f"{context} ids in the cache" for context in curve.contexts]
    lines = ["rows  " + "  ".join(f"{head:>26}" for head in heads)]
    for at, rows in enumerate(curve.rows):
        cells = [f"{line[at]:8.1f} ms  {line[at] / line[0]:5.2f} x" for line in curve.forward_ms]
        lines.append(f"{rows:4d}  " + "  ".join(f"{cell:>26}" for cell in cells))
    if curve.num_draft_tokens:
        shares = ", ".join(f"{size}: {ms:.1f}" for size, ms in enumerate(curve.draft_ms) if size)
        lines += ["", f"drafting adds, in ms, by the number of masks drafted from: {shares}"]
    return [*lines, "", curve.doubt] if curve.disturbed else lines


def _digest(model: MTPModel) -> str:
    """Hash of everything that changes what steps cost."""
    machine = gpu_marks(gpu_info())
    machine += [platform.platform(), str(os.cpu_count()), os.environ.get("OMP_NUM_THREADS", "")]
    packages = [package_version(), version("mlx"), BLAS]
    weights = [
        f"{name} {tuple(value.shape)} {value.dtype}"
        for name, value in cast("list[tuple[str, mx.array]]", tree_flatten(model.base.parameters()))
    ]
    everything = [*machine, *packages, os.environ.get(SWITCH, ""), *weights]
    return hashlib.sha256("\n".join(everything).encode()).hexdigest()[:24]
