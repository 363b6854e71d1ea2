"""Cost curves of chips from published numbers; ``chips.json`` lists them with their sources.

Most publications give the cost of one quantised matmul with M rows, relative to one row.  The cost
of a step follows from it with the assumptions in the file:

    step(M) = matmul_ms * ratio(M) + rest_ms * ceil(M / 8) + sync_ms
    matmul_ms = weights / (0.85 * bandwidth),   matmul_ms / (matmul_ms + rest_ms) = 0.9

where ``rest`` is attention and everything else, whose fast path takes 8 rows at a time.  If whole
steps were published, the ratio applies to the whole step.  Drafting from a group of m masks reads
the low-rank weights and the unembedding, with their dispatches, and runs the sampler head for each
draft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from mlx_mtp.planning.costs import CostCurve

DATA = "chips.json"
_UNKNOWN_PLAIN_MS = 1.0  # if the duration of a step is unknown, the unit of time is a plain step


@dataclass(frozen=True)
class Machine:
    """A machine to simulate.

    Attributes:
        name: name on the command line.
        description: chip, kernels and shape.
        curve: costs of steps up to the known number of rows; planners see nothing else.
        in_ms: whether times are milliseconds; otherwise they are plain steps, and only ratios are
            meaningful.
        notes: assumptions.
    """

    name: str
    description: str
    curve: CostCurve
    in_ms: bool = True
    notes: tuple[str, ...] = ()

    @property
    def max_rows(self) -> int:
        """Rows of the widest step with a known cost."""
        return self.curve.rows[-1]

    def scaled_to(self, plain_tps: float) -> Machine:
        """Return the same machine with all times scaled to a speed of plain decoding.

        Raises:
            ValueError: the rate is not positive.
        """
        if not (math.isfinite(plain_tps) and plain_tps > 0):
            raise ValueError(f"plain tokens per second must be positive, got {plain_tps}")
        scale = 1e3 / plain_tps / self.curve.forward(self.curve.contexts[0])[1]
        lines = tuple(tuple(ms * scale for ms in line) for line in self.curve.forward_ms)
        draft = tuple(ms * scale for ms in self.curve.draft_ms)
        notes = (*self.notes, f"all times scaled to {plain_tps:g} plain tokens per second")
        curve = replace(self.curve, forward_ms=lines, draft_ms=draft)
        return replace(self, curve=curve, in_ms=True, notes=notes)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published numbers of one chip; see ``chips.json``.

    Attributes:
        name: name on the command line.
        chip: name of the chip.
        kernels: origin of the kernels.
        shape: shape of the measured matmul or step.
        source: origin of the numbers.
        measured: "matmul" or "step".
        ratios: cost of M rows relative to one row, by M.
        one_row_ms: duration of one row; None if only ratios were published.
        model: key of the model's sizes, or "".
        bandwidth_gbs: published memory bandwidth, 10^9 bytes per second; 0 if it is not used.
        draft_ms: measured duration of drafting, or empty.
        note: remark for the user.
        assumed: assumptions of the file.
        sizes: sizes of the model.
    """

    name: str
    chip: str
    kernels: str
    shape: str
    source: str
    measured: str
    ratios: Mapping[int, float]
    one_row_ms: float | None = None
    model: str = ""
    bandwidth_gbs: float = 0.0
    draft_ms: tuple[float, ...] = ()
    note: str = ""
    assumed: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """Chip, kernels and shape."""
        return f"{self.chip}, {self.kernels}, {self.shape}"

    def machine(self, num_draft_tokens: int) -> Machine:
        """Return the chip as a machine that drafts ``num_draft_tokens`` per step."""
        rows = np.arange(1, max(self.ratios) + 1)
        ratio = np.interp(rows, list(self.ratios), list(self.ratios.values()))
        plain, known = self._plain_ms()
        if self.measured == "matmul":
            share, at_once = self.assumed["matmul_share"], self.assumed["attention_rows"]
            sync = self.assumed["sync_ms"] if known else 0.0
            work = plain - sync
            times = work * share * ratio + work * (1 - share) * np.ceil(rows / at_once) + sync
        else:
            times = plain * ratio
        curve = CostCurve(
            rows=tuple(rows.tolist()),
            contexts=(0,),
            forward_ms=(tuple(times.tolist()),),
            draft_ms=self._draft_ms(num_draft_tokens, plain),
            source=f"{self.description}: {self.source}",
        )
        return Machine(self.name, self.description, curve, known, (self.note,) if self.note else ())

    def _plain_ms(self) -> tuple[float, bool]:
        """Duration of a plain step, and whether it is in milliseconds."""
        if self.one_row_ms is not None:
            return self.one_row_ms, True
        if not (self.model and self.bandwidth_gbs):
            return _UNKNOWN_PLAIN_MS, False
        reading = self._read_ms(self.sizes["weights_gb"])
        return reading / self.assumed["matmul_share"] + self.assumed["sync_ms"], True

    def _read_ms(self, gigabytes: float) -> float:
        return 1e3 * gigabytes / (self.bandwidth_gbs * self.assumed["bandwidth_share"])

    def _draft_ms(self, num_draft_tokens: int, plain_ms: float) -> tuple[float, ...]:
        """Duration of drafting by the size of the mask group, ``[k + 1]``."""
        sizes = range(1, num_draft_tokens + 1)
        if self.draft_ms:
            last = len(self.draft_ms) - 1
            return (0.0, *(self.draft_ms[min(size, last)] for size in sizes))
        if not (self.model and self.bandwidth_gbs):
            once, per_draft = self.assumed["drafting_share"], self.assumed["draft_share"]
            return (0.0, *(plain_ms * (once + per_draft * size) for size in sizes))
        dispatch = self.assumed["dispatch_ms"]
        once = self._read_ms(self.sizes["drafting_gb"]) + self.sizes["dispatches"] * dispatch
        per_draft = self._read_ms(self.sizes["draft_gb"])
        per_draft += self.assumed["draft_dispatches"] * dispatch
        return (0.0, *(once + per_draft * size for size in sizes))


@lru_cache(maxsize=1)
def chips() -> dict[str, Chip]:
    """All published chips by name, in the order of the file."""
    data = json.loads((files("mlx_mtp.simulate") / DATA).read_text(encoding="utf-8"))
    return {chip["name"]: _chip(chip, data) for chip in data["chips"]}


def chip_named(name: str) -> Chip:
    """Return a chip by name.

    Raises:
        ValueError: there is no such chip.
    """
    if name not in chips():
        raise ValueError(f"unknown chip {name!r}; known chips: {', '.join(chips())}")
    return chips()[name]


def _chip(values: dict[str, Any], data: dict[str, Any]) -> Chip:
    values = dict(values)
    times = values.pop("step_ms", None)
    ratios = {int(rows): float(cost) for rows, cost in (times or values.pop("ratios")).items()}
    one = ratios[1]
    return Chip(
        **{**values, "draft_ms": tuple(values.get("draft_ms", ()))},
        ratios={rows: cost / one for rows, cost in ratios.items()},
        one_row_ms=one if times else None,
        assumed=data["assumed"],
        sizes=data["models"].get(values.get("model", ""), {}),
    )


def machine_of_curve(name: str, curve: CostCurve) -> Machine:
    """Return a machine with a curve that ``mlx-mtp tune`` measured."""
    return Machine(name, curve.source or name, curve)
