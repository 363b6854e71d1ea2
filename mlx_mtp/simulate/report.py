"""What a simulation says: tables for people, JSON, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_mtp.simulate.chips import chips
from mlx_mtp.simulate.replay import Replay, Tally
from mlx_mtp.simulate.simulation import MODES, Simulation
from mlx_mtp.simulate.trace import Trace

HEAD = "A simulation: nothing here was measured on these chips."
COLUMNS = (*MODES, "best fixed", "optimum")
_WIDTH = 15


def report_lines(found: Sequence[Simulation], trace: Trace, *, by_kind: bool = False) -> list[str]:
    """Tables of speed, and of what steps do."""
    tokens = sum(each.num_tokens for each in trace.answers)
    k = max(trace.num_draft_tokens, 1)
    lines = [
        HEAD,
        f"Trace: {len(trace.answers)} answers, {tokens} tokens, k = {k}; {trace.source}",
        "",
        "speed over plain decoding (plain: tokens a second); ~ where rows beyond the known serve",
        *_table(found, by_kind, _speed, extra=("clairvoyant", _clairvoyant)),
        "",
        "tokens per step / ms per step",
        *_table(found, by_kind, _step),
        "",
    ]
    for each in found:
        error = f" (+- {100 * each.optimum_error:.1f})" if math.isfinite(each.optimum_error) else ""
        auto = f"auto is at {100 * each.of_optimum:.1f}%{error} of the offline optimum"
        lines += [f"{each.machine.name}: {each.machine.curve.source}"]
        lines += [f"  {auto} ({each.optimum.name}); best fixed layout: {each.fixed[0]}"]
        lines += [f"  {note}" for note in each.machine.notes]
    return lines


def _table(found: Sequence[Simulation], by_kind: bool, cell: Any, extra: Any = None) -> list[str]:
    names = [each.machine.name for each in found]
    kinds = list(found[0].replays["plain"].kinds) if by_kind else []
    first = max(len(name) for name in [*names, *(f"  {kind}" for kind in kinds)]) + 2
    heads = [*COLUMNS, *([extra[0]] if extra else [])]
    lines = ["".ljust(first) + "".join(head.rjust(_WIDTH) for head in heads)]
    for each in found:
        columns = each.columns()
        cells = [cell(each, columns["plain"].total, columns[name], None) for name in COLUMNS]
        cells += [extra[1](each)] if extra else []
        lines.append(each.machine.name.ljust(first) + "".join(text.rjust(_WIDTH) for text in cells))
        for kind in kinds:
            plain = columns["plain"].kinds[kind]
            cells = [cell(each, plain, columns[name], kind) for name in COLUMNS]
            lines.append(f"  {kind}".ljust(first) + "".join(text.rjust(_WIDTH) for text in cells))
    return lines


def _speed(each: Simulation, plain: Tally, replayed: Replay, kind: str | None) -> str:
    tally = replayed.total if kind is None else replayed.kinds[kind]
    if tally is plain:
        return f"{tally.tps:.1f}/s" if each.machine.in_ms else "1.00 x"
    return _marked(each, tally, f"{each.speedup(tally, kind):.2f} x")


def _step(each: Simulation, plain: Tally, replayed: Replay, kind: str | None) -> str:
    del plain
    tally = replayed.total if kind is None else replayed.kinds[kind]
    time = f"{tally.ms_per_step:.1f}" if each.machine.in_ms else "?"
    return _marked(each, tally, f"{tally.tokens_per_step:.2f}/{time}")


def _marked(each: Simulation, tally: Tally, text: str) -> str:
    return "~" + text if each.is_reckoned(tally) else text


def _clairvoyant(each: Simulation) -> str:
    return f"{each.clairvoyant_tps / each.replays['plain'].total.tps:.2f} x"


def list_lines() -> list[str]:
    """The chips that are known, with their sources."""
    lines = []
    for each in chips().values():
        ratios = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in each.ratios.items())
        lines += [f"{each.name}: {each.what}", f"  source: {each.source}", f"  rows: {ratios}"]
        lines += [f"  {each.note}"] if each.note else []
    return lines


def draw(found: Sequence[Simulation], path: Path) -> None:
    """Draw the speed of the modes on each machine, as a PNG file.

    Raises:
        ValueError: matplotlib is missing, or the name does not end in .png.
    """
    import os

    if path.suffix != ".png":
        raise ValueError(f"{path}: pictures are PNG files, so the name must end in .png")
    try:
        from matplotlib.figure import Figure  # no pyplot: it wants a display and keeps figures
    except ImportError:
        raise ValueError('pictures take matplotlib: pip install "mlx-mtp[train]"') from None
    modes = ("linear", "quadratic", "auto", "optimum")
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    for at, mode in enumerate(modes):
        places = [row + (at - 1.5) * 0.2 for row in range(len(found))]
        widths = [each.speedup(each.columns()[mode].total) for each in found]
        axes.barh(places, widths, height=0.18, label=mode)
    axes.set_yticks(range(len(found)), [each.machine.name for each in found])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="speed over plain decoding", title=HEAD)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(draft, format="png", dpi=120, metadata={"Software": None})
    os.replace(draft, path)
