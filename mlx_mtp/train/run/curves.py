"""Curves of a training run, from its history: a PNG file, and a few lines for the terminal.

matplotlib draws the file and comes with the extra ``train``.  The terminal's charts need nothing:
they are dots of braille, or one line each where stdout is no terminal.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_EIGHTHS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell, by row
_EMPTY_CELL = 0x2800
_GUTTER = 9  # columns for the numbers beside a chart
_GAP = 3  # columns between two charts

Points = list[tuple[float, float]]


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the curves of a history into a PNG file, which appears whole or not at all.

    Three panels: the terms of the loss over the steps; tokens per step of the evaluations; and
    their acceptance by position.

    Args:
        records: the history, see ``history``; may be empty.
        path: the file.

    Raises:
        ValueError: matplotlib is missing.
        OSError: the file cannot be written; what was there before still is.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: it wants a display and keeps figures
    except ImportError:
        raise ValueError('curves are drawn with matplotlib: pip install "mlx-mtp[train]"') from None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, speed, acceptance = figure.subplots(1, 3)
    _draw_loss(loss, records)
    _draw_lines(speed, {"tokens per step": _points(records, "evaluation", "tokens_per_step")})
    speed.set_title("tokens per step, held out")
    _draw_acceptance(acceptance, _evaluations(records))
    for axes in (loss, speed, acceptance):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(draft, format="png", dpi=120, metadata={"Software": None})
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def terminal_curves(
    records: Sequence[dict[str, Any]], *, width: int, height: int, plain: bool | None = None
) -> str:
    """Return the loss and the tokens per step as text for a terminal.

    Args:
        records: the history, see ``history``.
        width: columns that the text may take.
        height: lines that the text may take.
        plain: one line for each curve; None does that where stdout is no terminal, and where the
            width or height is too small for more.

    Returns:
        Lines without a newline at the end; empty where the history has no curve.
    """
    curves = {
        "loss": _points(records, "report", "loss"),
        "tokens per step": _points(records, "evaluation", "tokens_per_step"),
    }
    curves = {name: points for name, points in curves.items() if points}
    if plain is None:
        plain = not sys.stdout.isatty()
    columns = (width - _GAP * (len(curves) - 1)) // max(len(curves), 1)
    if plain or height < 4 or columns < _GUTTER + 15:
        return "\n".join(_one_line(name, points, width) for name, points in curves.items())
    charts = [_chart(name, points, columns, height) for name, points in curves.items()]
    rows = zip(*charts, strict=True)
    return "\n".join((" " * _GAP).join(row).rstrip() for row in rows)


def _evaluations(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record.get("kind") == "evaluation"]


def _points(records: Sequence[dict[str, Any]], kind: str, key: str) -> Points:
    """(step, value) of the records that have a finite value."""
    found = [(record["step"], record.get(key)) for record in records if record.get("kind") == kind]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _draw_loss(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Each term of the loss, and the next-token loss, which the gate keeps level."""
    reports = [record for record in records if record.get("kind") == "report"]
    names = dict.fromkeys(name for record in reports for name in record.get("terms", {}))
    terms = [
        {**record.get("terms", {}), "kind": "report", "step": record["step"]} for record in reports
    ]
    lines = {name: _points(terms, "report", name) for name in names}
    lines["next token"] = _points(records, "evaluation", "next_token_loss")
    _draw_lines(axes, lines)
    axes.set_title("loss")


def _draw_acceptance(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    """One line for each position of a draft."""
    counts = [len(record.get("acceptance", ())) for record in evaluations]
    lines: dict[str, Points] = {}
    for position in range(max(counts, default=0)):
        lines[f"draft {position + 1}"] = [
            (record["step"], record["acceptance"][position])
            for record, count in zip(evaluations, counts, strict=True)
            if position < count
        ]
    _draw_lines(axes, lines, legend_outside=True)
    axes.set_ylim(0, 1)
    axes.set_title("drafts accepted, by position")


def _draw_lines(axes: Any, lines: dict[str, Points], *, legend_outside: bool = False) -> None:
    lines = {name: points for name, points in lines.items() if points}
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3)
    if len(lines) > 1:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if legend_outside else {}
        axes.legend(fontsize="small", **place)


def _one_line(name: str, points: Points, width: int) -> str:
    """A curve as eighths of blocks, with its first and last value."""
    values = [value for _, value in points]
    head, tail = f"{name} {values[0]:.3g} ", f" {values[-1]:.3g}"
    room = max(min(width - len(head) - len(tail), 60), 1)
    if len(values) > room:
        ends = [round(index * len(values) / room) for index in range(room + 1)]
        values = [_mean(values[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    levels = (round((value - low) / span * (len(_EIGHTHS) - 1)) for value in values)
    return head + "".join(_EIGHTHS[level] for level in levels) + tail


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _chart(name: str, points: Points, width: int, height: int) -> list[str]:
    """A curve as ``height`` lines of ``width`` columns: title, dots, and the steps below."""
    rows, columns = height - 2, width - _GUTTER
    (first, _), (last, _) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    cells = [[_EMPTY_CELL] * columns for _ in range(rows)]
    for x, y in _dots(points, 2 * columns, 4 * rows):
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    labels = {0: f"{high:.3g}", rows - 1: f"{low:.3g}"}
    lines = [" " * _GUTTER + name]
    for index, row in enumerate(cells):
        lines.append(f"{labels.get(index, ''):>{_GUTTER - 2}} ┤" + "".join(map(chr, row)))
    start, end = f"{first:g}", f"step {last:g}"
    lines.append(" " * _GUTTER + start + end.rjust(columns - len(start)))
    return [line[:width].ljust(width) for line in lines]


def _dots(points: Points, width: int, height: int) -> list[tuple[int, int]]:
    """Where a curve runs on a grid of dots, row 0 at the top, points joined by straight lines."""
    (first, _), (last, _) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = (last - first) or 1.0, (high - low) or 1.0
    grid = [((x - first) / across * (width - 1), (high - y) / up * (height - 1)) for x, y in points]
    dots = [(round(x), round(y)) for x, y in grid]
    for (x0, y0), (x1, y1) in zip(grid, grid[1:], strict=False):
        count = math.ceil(max(abs(x1 - x0), abs(y1 - y0)))
        shares = [index / count for index in range(count)]
        dots += [(round(x0 + s * (x1 - x0)), round(y0 + s * (y1 - y0))) for s in shares]
    return dots
