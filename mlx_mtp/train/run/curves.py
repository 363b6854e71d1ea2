"""Curves of a training run, from its history: a PNG file by matplotlib, and a chart by plotext.

Both libraries come with the extra ``train``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_mtp.storage.figures import figure_class, save_figure
from mlx_mtp.train.run.checkpoint import RAW
from mlx_mtp.train.run.display import short_name

Points = list[tuple[float, float]]


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the curves of a history into a PNG file, written atomically.

    Three panels: the terms of the loss over the steps; tokens per step of the evaluations, with raw
    and averaged weights; and the better ones' acceptance by position.

    Args:
        records: the history, see ``history``; may be empty.
        path: the file.

    Raises:
        ValueError: matplotlib is missing.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    figure = figure_class("train")(figsize=(12, 3.6), layout="constrained")
    loss, speed, acceptance = figure.subplots(1, 3)
    _draw_loss(loss, records)
    _draw_lines(speed, _speeds(records))
    speed.set_title("tokens per step, held out")
    _draw_acceptance(acceptance, _evaluations(records))
    for axes in (loss, speed, acceptance):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    save_figure(figure, path, ["png"])


def terminal_curves(records: Sequence[dict[str, Any]], *, width: int, height: int) -> str:
    """Return the loss and the tokens per step as charts next to each other.

    Args:
        records: the history, see ``history``.
        width: columns of the text, at most those of the terminal.
        height: lines of the text, at most those of the terminal.

    Returns:
        Lines without a newline at the end; empty if the history has no curve.

    Raises:
        ValueError: plotext is missing.
    """
    try:
        import plotext
    except ImportError:
        raise ValueError('charts need plotext: pip install "mlx-mtp[train]"') from None
    curves = {
        "loss": _points(records, "report", "loss"),
        "tokens per step": _points(records, "evaluation", "tokens_per_step"),
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    plotext.figure.clear()
    plotext.figure.plot_size(width, height)
    plotext.figure.subplots(1, 2)
    for column, (name, points) in enumerate(curves.items(), start=1):
        chart = plotext.figure.subplot(1, column)
        chart.plot_size(width // len(curves), height)
        chart.title(f"{name}, by step")
        steps, values = zip(*points, strict=True)
        chart.draw(chart.signal(list(steps), list(values), marker="braille").lines())
    lines = plotext.uncolorize(str(plotext.figure.build())).rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def _evaluations(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record.get("kind") == "evaluation"]


def _points(records: Sequence[dict[str, Any]], kind: str, key: str) -> Points:
    """(step, value) of the records that have a finite value."""
    pairs = [(record["step"], record.get(key)) for record in records if record.get("kind") == kind]
    return [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]


def _speeds(records: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """Tokens per step by weights; histories from before there was an average have one line."""
    lines: dict[str, Points] = {}
    for record in _evaluations(records):
        results = record.get("results") or {RAW: record}
        for name, result in results.items():
            value = result.get("tokens_per_step")
            if value is not None and math.isfinite(value):
                lines.setdefault(f"{short_name(name)} weights", []).append((record["step"], value))
    return lines


def _draw_loss(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Each term of the loss, and the next-token loss, which is constant with the gate."""
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
