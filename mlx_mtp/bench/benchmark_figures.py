"""A report as a plot: speed-ups by kind of text, step costs, acceptance by position."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mtp.bench.summary import acceptance_rates
from mlx_mtp.bench.tables import ALL
from mlx_mtp.planning.costs import CostCurve
from mlx_mtp.storage.figures import figure_class, save_figure

_LEGEND = {"fontsize": "small"}
_NUM_LABELS = 3  # layouts per mode that get a label


def draw_report(report: dict[str, Any], path: Path) -> list[Path]:
    """Draw a report; the same report gives the same files.

    Three panels, for the first of its contexts: the speed-up of each mode by kind of text, with
    its interval; milliseconds of a step by its rows, as the planner expects them and as measured
    for each layout (drafts + masks), above the share of steps with that number of rows; and the
    acceptance rate of drafts by position.

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
    after = f", after {context} tokens of text" if context else ""
    interrupted = "" if report["status"] == "complete" else " (interrupted)"
    figure.suptitle(f"{report['model']['name']} on {report['machine']['name']}{after}{interrupted}")
    return save_figure(figure, path)


def _draw_speedups(axes: Any, report: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Bars by kind of text, one for each mode except the baseline."""
    modes = [mode["name"] for mode in report["modes"]]
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    height = 0.8 / max(len(modes) - 1, 1)
    for index, mode in enumerate(modes[1:]):
        rows = [cell for cell in cells if cell["mode"] == mode and cell["speedup"] is not None]
        ys = [kinds.index(cell["kind"]) + index * height for cell in rows]
        axes.barh(ys, [cell["speedup"] for cell in rows], height=height * 0.9, label=mode)
        for y, cell in zip(ys, rows, strict=True):
            if cell["speedup_low"] is not None:
                ends = [cell["speedup_low"], cell["speedup_high"]]
                axes.plot(ends, [y, y], color="black", marker="|", linewidth=1)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    middle = height * (len(modes) - 2) / 2
    names = [kind or ALL for kind in kinds]
    axes.set_yticks(np.arange(len(kinds)) + max(middle, 0), names)
    axes.invert_yaxis()
    axes.set(title=f"speed-up over {modes[0]}", xlabel="ratio of speeds, with 95% interval")
    axes.grid(alpha=0.3, axis="x")
    if len(modes) > 1:
        axes.legend(**_LEGEND)


def _draw_costs(axes: Any, report: dict[str, Any], context: int) -> None:
    """Milliseconds of layouts by their rows; shares of steps as bars with a scale of their own."""
    by_mode: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in report["layouts"]:
        if row["context"] == context and row["mode"] not in ("stock", "draft"):
            by_mode[row["mode"]].append(row | {"rows": 1 + row["drafts"] + row["masks"]})
    bars = axes.twinx()
    width = 0.8 / max(len(by_mode), 1)
    for index, (mode, layouts) in enumerate(sorted(by_mode.items())):
        shift = (index - (len(by_mode) - 1) / 2) * width
        _draw_layouts(axes, bars, mode, layouts, shift=shift, width=width)
    last = max((row["rows"] for layouts in by_mode.values() for row in layouts), default=1)
    if report["cost_curve"]:
        forward = CostCurve.from_dict(report["cost_curve"]).forward(context)[: last + 2]
        axes.plot(range(1, len(forward)), forward[1:], color="black", label="forward, expected")
    bars.set(ylabel="share of steps (bars)", ylim=(0, 1))
    axes.set(title="step costs and layouts", xlabel="rows of a step", ylabel="ms")
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
    layouts: list[dict[str, Any]],
    *,
    shift: float,
    width: float,
) -> None:
    """A point per layout of a mode, the most frequent labelled drafts + masks; bars by rows."""
    total = sum(row["steps"] for row in layouts)
    shares: dict[int, float] = defaultdict(float)
    for row in layouts:
        shares[row["rows"]] += row["steps"] / total
    bars.bar([rows + shift for rows in shares], list(shares.values()), width=width, alpha=0.3)
    axes.scatter(
        [row["rows"] for row in layouts],
        [row["ms"] for row in layouts],
        s=[12 + 60 * row["steps"] / total for row in layouts],
        label=f"{mode}, measured steps",
    )
    for row in sorted(layouts, key=lambda row: -row["steps"])[:_NUM_LABELS]:
        name = f"{row['drafts']}+{row['masks']}"
        axes.annotate(name, (row["rows"], row["ms"]), (4, 4), textcoords="offset points")


def _draw_acceptance(axes: Any, cells: list[dict[str, Any]]) -> None:
    """A line per mode over all kinds, and thin lines by kind for the mode with the most drafts."""
    cells = [cell for cell in cells if sum(cell["verified"])]
    totals = [cell for cell in cells if cell["kind"] is None]
    if totals:
        mode = max(totals, key=lambda cell: sum(cell["verified"]))["mode"]
        by_kind = [cell for cell in cells if cell["mode"] == mode and cell["kind"] is not None]
        for cell in [*totals, *by_kind]:
            rates = acceptance_rates(cell)
            is_total = cell["kind"] is None
            name = cell["mode"] if is_total else f"{mode}, {cell['kind']}"
            style = (
                {"marker": "o", "linewidth": 2} if is_total else {"marker": ".", "linewidth": 0.8}
            )
            axes.plot(range(1, len(rates) + 1), rates, label=name, **style)
        axes.legend(**_LEGEND)
        axes.set_xticks(range(1, 1 + max(len(acceptance_rates(cell)) for cell in totals)))
    title = "drafts accepted with all before them"
    axes.set(title=title, xlabel="position", ylabel="acceptance rate")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
