"""Line charts for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_mtp.storage.figures import figure_class, save_figure

Points = Sequence[tuple[float, ...]]


def draw_lines(
    lines: Mapping[str, Points],
    path: Path,
    *,
    x: str,
    y: str,
    title: str = "",
    marks: bool = True,
    log_x: bool = False,
) -> list[Path]:
    """Draw one chart; the same numbers give the same files.

    Args:
        lines: points by name, (x, y) or (x, y, half the width of an interval); a name that begins
            with "linear" is dashed.
        path: file name without its extension.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        title: title of the chart.
        marks: whether to mark the points.
        log_x: whether the horizontal axis doubles from tick to tick.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = figure_class()(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.errorbar(
            [point[0] for point in points],
            [point[1] for point in points],
            yerr=[point[2] for point in points] if len(points[0]) > 2 else None,
            capsize=3,
            marker="o" if marks else None,
            linestyle="--" if name.startswith("linear") else "-",
            label=name,
        )
    ticks = sorted({point[0] for points in lines.values() for point in points})
    if log_x:
        from matplotlib.ticker import ScalarFormatter

        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if log_x or (marks and len(ticks) <= 16):
        axes.set_xticks(ticks)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    # Above the chart, where it hides no line.
    figure.legend(loc="outside upper center", ncols=min(len(lines), 2), frameon=False)
    return save_figure(figure, path)
