"""A report as a picture: speed-up by kind of text, what rows cost, acceptance by position."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mtp.bench.summary import shares
from mlx_mtp.bench.tables import ALL
from mlx_mtp.planning.costs import CostCurve
from mlx_mtp.storage.figures import figure_class, save_figure

_LEGEND = {"fontsize": "small"}
_NAMED = 3  # layouts of a mode that are named


def draw_report(report: dict[str, Any], path: Path) -> list[Path]:
    """Draw a report; the same report gives the same files.

    Three panels, at the first of its contexts: the speed-up of each mode by kind of text, with its
    interval; milliseconds of a step by its rows, as the planner knows them and as each layout took
    here (drafts + masks), above the share of steps with so many rows; and the share of drafts that
    held by position.

    Args:
        report: from ``report.build_report``.
        path: file name; a PNG and an SVG file of that name are written.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    figure = figure_class()(figsize=(15, 4.6), layout="constrained")
    speed, cost, acceptance = figure.subplots(1, 3)
    context = report["figures"][0]["context"]
    cells = [cell for cell in report["figures"] if cell["context"] == context]
    _draw_speedups(speed, report, cells)
    _draw_costs(cost, report, context)
    _draw_acceptance(acceptance, cells)
    behind = f", behind {context} tokens of text" if context else ""
    interrupted = "" if report["status"] == "complete" else " (interrupted)"
    figure.suptitle(
        f"{report['model']['name']} on {report['machine']['name']}{behind}{interrupted}"
    )
    return save_figure(figure, path)


def _draw_speedups(axes: Any, report: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Bars by kind, one for each mode but the base."""
    modes = [mode["name"] for mode in report["modes"]]
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    height = 0.8 / max(len(modes) - 1, 1)
    for place, mode in enumerate(modes[1:]):
        found = {cell["kind"]: cell for cell in cells if cell["mode"] == mode}
        rows = [(at, found[kind]) for at, kind in enumerate(kinds) if kind in found]
        rows = [(at, cell) for at, cell in rows if cell["speedup"] is not None]
        at = [index + place * height for index, _ in rows]
        axes.barh(at, [cell["speedup"] for _, cell in rows], height=height * 0.9, label=mode)
        ends = [
            (y, cell["speedup_low"], cell["speedup_high"])
            for y, (_, cell) in zip(at, rows, strict=True)
            if cell["speedup_low"] is not None
        ]
        for y, low, high in ends:
            axes.plot([low, high], [y, y], color="black", marker="|", linewidth=1)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    middle = height * (len(modes) - 2) / 2
    names = [kind or ALL for kind in kinds]
    axes.set_yticks(np.arange(len(kinds)) + max(middle, 0), names)
    axes.invert_yaxis()
    axes.set(title=f"speed-up against {modes[0]}", xlabel="times, with 95% interval")
    axes.grid(alpha=0.3, axis="x")
    if len(modes) > 1:
        axes.legend(**_LEGEND)


def _draw_costs(axes: Any, report: dict[str, Any], context: int) -> None:
    """Milliseconds of layouts by their rows; shares of steps as bars on a scale of their own."""
    by_mode: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in report["layouts"]:
        if row["context"] == context and row["mode"] not in ("stock", "draft"):
            by_mode[row["mode"]].append(row | {"rows": 1 + row["drafts"] + row["masks"]})
    bars = axes.twinx()
    width = 0.8 / max(len(by_mode), 1)
    for place, (mode, found) in enumerate(sorted(by_mode.items())):
        shift = (place - (len(by_mode) - 1) / 2) * width
        _draw_layouts(axes, bars, mode, found, shift=shift, width=width)
    last = max((row["rows"] for found in by_mode.values() for row in found), default=1)
    if report["cost_curve"]:
        forward = CostCurve.from_dict(report["cost_curve"]).forward(context)[: last + 2]
        axes.plot(range(1, len(forward)), forward[1:], color="black", label="forward, measured")
    bars.set(ylabel="share of steps (bars)", ylim=(0, 1))
    axes.set(title="what rows cost, and which were used", xlabel="rows of a step", ylabel="ms")
    axes.set_ylim(bottom=0)
    axes.set_zorder(bars.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(**_LEGEND)


def _draw_layouts(
    axes: Any,
    bars: Any,
    mode: str,
    found: list[dict[str, Any]],
    *,
    shift: float,
    width: float,
) -> None:
    """One mode's layouts: a point each, the commonest named as drafts + masks, and bars by rows."""
    total = sum(row["steps"] for row in found)
    shares_of: dict[int, float] = defaultdict(float)
    for row in found:
        shares_of[row["rows"]] += row["steps"] / total
    at = [rows + shift for rows in shares_of]
    bars.bar(at, list(shares_of.values()), width=width, alpha=0.3)
    axes.scatter(
        [row["rows"] for row in found],
        [row["ms"] for row in found],
        s=[12 + 60 * row["steps"] / total for row in found],
        label=f"{mode}, steps taken",
    )
    for row in sorted(found, key=lambda row: -row["steps"])[:_NAMED]:
        name = f"{row['drafts']}+{row['masks']}"
        axes.annotate(name, (row["rows"], row["ms"]), (4, 4), textcoords="offset points")


def _draw_acceptance(axes: Any, cells: list[dict[str, Any]]) -> None:
    """A line for each mode over all kinds, thin ones by kind for the mode with the most drafts."""
    totals = [cell for cell in cells if cell["kind"] is None and sum(cell["verified"])]
    for cell in totals:
        held = shares(cell)
        axes.plot(range(1, len(held) + 1), held, marker="o", linewidth=2, label=cell["mode"])
    if totals:
        most = max(totals, key=lambda cell: sum(cell["verified"]))["mode"]
        for cell in cells:
            if cell["mode"] == most and cell["kind"] is not None and sum(cell["verified"]):
                held = shares(cell)
                name = f"{most}, {cell['kind']}"
                axes.plot(range(1, len(held) + 1), held, linewidth=0.8, marker=".", label=name)
        axes.legend(**_LEGEND)
        axes.set_xticks(range(1, 1 + max(len(shares(cell)) for cell in totals)))
    axes.set(title="drafts that held, with all before them", xlabel="position", ylabel="share")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
