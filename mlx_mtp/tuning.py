"""Measure what a step costs here, and remember it by machine and model.

Measured are the decoder's own steps: verifying alone gives the forward by its rows, and steps with
as many rows but some of them masks give what drafting adds.  Wide steps are left out as soon as
they cost more than they could ever bring.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mlx_mtp
from mlx_mtp.accept import Sampling
from mlx_mtp.acceptance import UNKNOWN, Acceptance
from mlx_mtp.cost_curve import UNMEASURED, CostCurve, LiveCosts
from mlx_mtp.decode import HEAD_ROWS, Decoder
from mlx_mtp.default_model import cache_dir
from mlx_mtp.draft import Drafts
from mlx_mtp.kernel_choice import SWITCH
from mlx_mtp.layout import StepLayout
from mlx_mtp.lookup import LONGEST_LOOKUP
from mlx_mtp.machine import gpu_info, gpu_marks, machine_name
from mlx_mtp.model import MTPModel
from mlx_mtp.planner import Speculation
from mlx_mtp.small_files import write_atomically

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 25, 32, 33, 48, 64, 81, 96)
CONTEXTS = (64, 1024)
ROUNDS = 2
SECONDS = 5.0  # for the forwards of one context; what would come later is left out
_DRAFT_ROWS = 9  # rows of the steps that tell what drafting adds

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
        say: called with a line about what is going on.
    """
    k, half = model.num_draft_tokens, max((model.max_context or 2**62) // 2, 1)
    contexts = sorted({min(each, half) for each in contexts})
    useful = max((k + 1) ** 2, LONGEST_LOOKUP + 1)
    rows = [each for each in ROWS if each <= min(useful, half)]
    lines = []
    bench = StepBench(model, contexts[0])
    draft_ms = bench.draft_ms(rounds)
    for context in contexts:
        bench = bench if context == contexts[0] else StepBench(model, context)
        say(f"Measuring what rows cost at {context} ids ...")
        line = bench.forward_ms(rows, draft_ms, rounds)
        rows = rows[: len(line)]
        lines.append(tuple(line))
    lines = [line[: len(rows)] for line in lines]
    return CostCurve(
        rows=tuple(rows),
        contexts=tuple(contexts),
        forward_ms=tuple(lines),
        draft_ms=tuple(draft_ms),
        source=f"measured {time.strftime('%Y-%m-%d')} on {machine_name(gpu_info())}",
    )


class StepBench:
    """Steps of a model over a cache with so many ids, run again and again."""

    def __init__(self, model: MTPModel, context: int) -> None:
        self._model = model
        self._cache = model.make_cache()
        self._decoder = Decoder(model, self._cache, Sampling(), [])
        self._ids = [(7 * each + 1) % model.vocab_size for each in range(context)]
        self._cache.begin_step()
        mx.eval(model(mx.array([self._ids]), cache=self._cache))

    def ms(self, layouts: Sequence[StepLayout], rounds: int) -> list[float]:
        """Least time of each step; the rounds go through all of them in turn.

        Whatever else the machine does only adds, so the least is nearest to the step's own time.
        """
        times: list[list[float]] = [[] for _ in layouts]
        for turn in range(rounds + 1):
            for at, layout in enumerate(layouts):
                ms = self._step_ms(layout)
                times[at] += [ms] if turn else []  # the first one warms up
        return [min(each) for each in times]

    def draft_ms(self, rounds: int) -> list[float]:
        """What drafting adds to a step by the size of the group, ``[k + 1]``."""
        k = self._model.num_draft_tokens
        sizes = sorted({size for size in (1, 2, 4, 8, k) if size <= k})
        if not sizes:
            return [0.0]
        rows = max(_DRAFT_ROWS, k + 1)
        layouts = [_verify_only(rows), *(_one_group(rows, size) for size in sizes)]
        bare, *drafting = self.ms(layouts, rounds)
        added = [0.0, *(max(each - bare, 0.0) for each in drafting)]
        added = np.minimum.accumulate(added[::-1])[::-1].tolist()
        return np.interp(np.arange(k + 1), [0, *sizes], added).tolist()

    def forward_ms(
        self, rows: Sequence[int], draft_ms: Sequence[float], rounds: int
    ) -> list[float]:
        """Time of a forward by rows; ends where more rows could never pay, or time is up."""
        k = len(draft_ms) - 1
        deadline = time.perf_counter() + SECONDS
        found: list[float] = []
        for start in range(0, len(rows), 4):
            layouts = [_wide(each, k) for each in rows[start : start + 4]]
            times = self.ms(layouts, rounds)
            for layout, ms in zip(layouts, times, strict=True):
                drafting = draft_ms[max(layout.mask_counts)]
                found.append(max(ms - drafting, ms / 4))
            if (k and found[-1] > (k + 1) * min(found)) or time.perf_counter() > deadline:
                break
        return found

    def _step_ms(self, layout: StepLayout) -> float:
        drafts = Drafts.certain(mx.array(self._ids[: layout.num_draft_tokens], mx.int32))
        drafts.tokens.tolist()
        self._cache.begin_step()
        began = time.perf_counter()
        self._decoder.step(self._ids[-1:], drafts, layout, context=self._ids, key=mx.random.key(0))
        ms = (time.perf_counter() - began) * 1e3
        self._cache.rewind(layout.num_rows)
        return ms


def _verify_only(rows: int) -> StepLayout:
    return StepLayout(1, rows - 1, (0,) * rows)


def _one_group(rows: int, size: int) -> StepLayout:
    drafts = rows - 1 - size
    return StepLayout(1, drafts, (0,) * drafts + (size,))


def _wide(rows: int, k: int) -> StepLayout:
    """A step with so many rows; the wide ones have masks behind all drafts, about alike."""
    if rows <= HEAD_ROWS or rows > (k + 1) ** 2:
        return _verify_only(rows)
    drafts = next(each for each in range(1, k + 1) if (each + 1) * min(each + 1, k + 1) >= rows)
    share, more = divmod(rows - 1 - drafts, drafts + 1)
    return StepLayout(1, drafts, (share + 1,) * more + (share,) * (drafts + 1 - more))


def kept_costs(
    model: MTPModel, *, measure: bool = True, again: bool = False, say: Say = lambda text: None
) -> CostCurve | None:
    """The cost curve of this model on this machine: the one that is kept, or a new one.

    Args:
        model: with its adapter.
        measure: whether to measure where none is kept; None is returned otherwise.  What another
            machine or version measured does not count, even if its file was copied here.
        again: measure even so.
        say: called with a line while it measures.
    """
    digest = _digest(model)
    path = cache_dir() / "costs" / f"{digest}.json"
    if not again:
        with contextlib.suppress(OSError, ValueError):
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and values.get("made_for") == digest:
                return CostCurve.from_dict(values)
    if not (measure or again):
        return None
    curve = measure_costs(model, say=say)
    with contextlib.suppress(OSError):  # a cache that cannot be written is measured for again
        values = {"made_for": digest} | curve.to_dict()
        write_atomically(path, json.dumps(values, indent=2) + "\n")
    return curve


def speculation_for(
    model: MTPModel, *, measure: bool = True, say: Say = lambda text: None
) -> Speculation:
    """What the planner knows of a model on this machine; one object as long as the model lives.

    Args:
        model: with its adapter.
        measure: whether to measure what rows cost if that was not done here before (seconds);
            otherwise it is guessed.
        say: called with a line while it measures.
    """
    known = model.speculation
    if known is None or (measure and known.costs.curve is UNMEASURED):
        curve = kept_costs(model, measure=measure, say=say) or UNMEASURED
        shares = model.config.acceptance if model.config else ()
        k = model.num_draft_tokens
        prior = Acceptance.from_shares(shares) if shares else Acceptance([UNKNOWN] * max(k, 1))
        known = model.speculation = Speculation(LiveCosts(curve), prior)
    return known


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
    return lines


def _digest(model: MTPModel) -> str:
    """Hash of everything that changes what steps cost."""
    machine = gpu_marks(gpu_info())
    machine += [platform.platform(), str(os.cpu_count()), os.environ.get("OMP_NUM_THREADS", "")]
    packages = [mlx_mtp.__version__, version("mlx"), str(mlx_mtp.BLAS)]
    weights = [
        f"{name} {tuple(value.shape)} {value.dtype}"
        for name, value in cast("list[tuple[str, mx.array]]", tree_flatten(model.base.parameters()))
    ]
    everything = [*machine, *packages, os.environ.get(SWITCH, ""), *weights]
    return hashlib.sha256("\n".join(everything).encode()).hexdigest()[:24]
