"""Charts as PNG and SVG files; line charts for the documentation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]
_FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


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
        lines: points by name; a name that begins with "linear" is dashed.
        path: file name without its ending.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        title: of the chart.
        marks: whether points are marked.
        log_x: whether the horizontal axis doubles from tick to tick.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = figure_class()(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
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


def figure_class() -> Any:
    """matplotlib's ``Figure``; pyplot would want a display and keep figures.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            'figures are drawn with matplotlib: pip install "mlx-mtp[bench]"'
        ) from None
    return Figure


def save_figure(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all; the same figure gives the same.

    Args:
        figure: matplotlib's.
        path: file name, whose ending is replaced.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context({"svg.hashsalt": path.name}):
        for ending, metadata in _FORMATS.items():
            file = path.with_suffix(f".{ending}")
            draft = file.with_name(f".{file.name}.{os.getpid()}")
            try:
                figure.savefig(draft, format=ending, dpi=120, metadata=metadata)
                os.replace(draft, file)
            finally:
                draft.unlink(missing_ok=True)
            files.append(file)
    return files
