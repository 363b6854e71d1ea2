"""Cost curves of chips from published numbers: ``chips.json`` holds them with their sources.

What was published is mostly what M rows of one quantised matmul cost over one row.  A step is made
of it by the assumptions that stand in the file:

    step(M) = matmul_ms * ratio(M) + rest_ms * ceil(M / 8) + sync_ms
    matmul_ms = weights / (0.85 * bandwidth),   matmul_ms / (matmul_ms + rest_ms) = 0.9

where ``rest`` is attention and all else, whose fast path takes 8 rows at a time.  Where whole steps
were published, the ratio applies to all of it.  Drafting from a group of m masks takes the reading
of the low-rank weights and the unembedding, their dispatches, and for each draft the sampler head.
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
_UNTOLD_PLAIN_MS = 1.0  # where nothing tells the time of a step, times are in plain steps


@dataclass(frozen=True)
class Machine:
    """What a simulation runs on.

    Attributes:
        name: for the command line.
        what: chip, kernels and shape, for people.
        curve: what steps cost, up to the rows that are known; all that a planner sees.
        in_ms: whether its times are milliseconds; otherwise plain steps, and only ratios count.
        notes: what was assumed.
    """

    name: str
    what: str
    curve: CostCurve
    in_ms: bool = True
    notes: tuple[str, ...] = ()

    @property
    def most_rows(self) -> int:
        """Rows of the widest step that is known."""
        return self.curve.rows[-1]

    def scaled_to(self, plain_tps: float) -> Machine:
        """The same machine where plain decoding emits so many tokens a second.

        Raises:
            ValueError: the rate is not positive.
        """
        if not (math.isfinite(plain_tps) and plain_tps > 0):
            raise ValueError(f"plain tokens a second must be positive, got {plain_tps}")
        scale = 1e3 / plain_tps / self.curve.forward(self.curve.contexts[0])[1]
        lines = tuple(tuple(ms * scale for ms in line) for line in self.curve.forward_ms)
        draft = tuple(ms * scale for ms in self.curve.draft_ms)
        notes = (*self.notes, f"all times scaled to {plain_tps:g} plain tokens a second")
        curve = replace(self.curve, forward_ms=lines, draft_ms=draft)
        return replace(self, curve=curve, in_ms=True, notes=notes)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published numbers of one chip; see ``chips.json``.

    Attributes:
        name: for the command line.
        chip: its name.
        kernels: whose kernels.
        shape: what was measured.
        source: whose numbers.
        measured: "matmul", or "step" where whole steps were.
        ratios: cost of M rows over one row, by M.
        in_ms: whether ``ratios`` were published as times; the time of one row, or None.
        model: key of the model's sizes, or "".
        bandwidth_gbs: published memory bandwidth, 10^9 bytes a second; 0 where it plays no part.
        draft_ms: measured drafting, where it was.
        note: for people.
    """

    name: str
    chip: str
    kernels: str
    shape: str
    source: str
    measured: str
    ratios: Mapping[int, float]
    in_ms: float | None = None
    model: str = ""
    bandwidth_gbs: float = 0.0
    draft_ms: tuple[float, ...] = ()
    note: str = ""
    assumed: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """For people."""
        return f"{self.chip}, {self.kernels}, {self.shape}"

    def machine(self, num_draft_tokens: int) -> Machine:
        """As a machine that drafts so many tokens."""
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
            source=f"{self.what}: {self.source}",
        )
        return Machine(self.name, self.what, curve, known, (self.note,) if self.note else ())

    def _plain_ms(self) -> tuple[float, bool]:
        """Time of a plain step, and whether anything tells it."""
        if self.in_ms is not None:
            return self.in_ms, True
        if not (self.model and self.bandwidth_gbs):
            return _UNTOLD_PLAIN_MS, False
        reading = self._read_ms(self.sizes["weights_gb"])
        return reading / self.assumed["matmul_share"] + self.assumed["sync_ms"], True

    def _read_ms(self, gigabytes: float) -> float:
        return 1e3 * gigabytes / (self.bandwidth_gbs * self.assumed["bandwidth_share"])

    def _draft_ms(self, num_draft_tokens: int, plain_ms: float) -> tuple[float, ...]:
        """What drafting adds by the size of the mask group, ``[k + 1]``."""
        sizes = range(1, num_draft_tokens + 1)
        if self.draft_ms:
            last = len(self.draft_ms) - 1
            return (0.0, *(self.draft_ms[min(size, last)] for size in sizes))
        if not (self.model and self.bandwidth_gbs):
            once, each = self.assumed["drafting_share"], self.assumed["draft_share"]
            return (0.0, *(plain_ms * (once + each * size) for size in sizes))
        dispatch = self.assumed["dispatch_ms"]
        once = self._read_ms(self.sizes["drafting_gb"]) + self.sizes["dispatches"] * dispatch
        each = self._read_ms(self.sizes["draft_gb"]) + self.assumed["draft_dispatches"] * dispatch
        return (0.0, *(once + each * size for size in sizes))


@lru_cache(maxsize=1)
def chips() -> dict[str, Chip]:
    """All published chips by name, in the order of the file."""
    data = json.loads((files("mlx_mtp.simulate") / DATA).read_text(encoding="utf-8"))
    return {each["name"]: _chip(each, data) for each in data["chips"]}


def chip_named(name: str) -> Chip:
    """The chip of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in chips():
        raise ValueError(f"there is no chip {name!r}; known are {', '.join(chips())}")
    return chips()[name]


def _chip(values: dict[str, Any], data: dict[str, Any]) -> Chip:
    values = dict(values)
    times = values.pop("step_ms", None)
    ratios = {int(rows): float(cost) for rows, cost in (times or values.pop("ratios")).items()}
    one = ratios[1]
    return Chip(
        **{**values, "draft_ms": tuple(values.get("draft_ms", ()))},
        ratios={rows: cost / one for rows, cost in ratios.items()},
        in_ms=one if times else None,
        assumed=data["assumed"],
        sizes=data["models"].get(values.get("model", ""), {}),
    )


def machine_of_curve(name: str, curve: CostCurve) -> Machine:
    """A machine whose curve ``mlx-mtp tune`` measured."""
    return Machine(name, curve.source or name, curve)
