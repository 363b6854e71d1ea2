"""Results of simulations as tables and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_mtp.simulate.chips import chips
from mlx_mtp.simulate.simulation import MODES, Simulation
from mlx_mtp.simulate.trace import Trace
from mlx_mtp.storage.figures import figure_class, save_figure

HEAD = "A simulation: nothing here was measured on these chips."
COLUMNS = (*MODES, "best fixed", "optimum")
_PLOTTED = ("linear", "quadratic", "auto", "optimum")
_WIDTH = 15

# Text of a column for one kind of text, or for all kinds if it is None.
Cell = Callable[[Simulation, str, str | None], str]


def report_lines(
    results: Sequence[Simulation], trace: Trace, *, by_kind: bool = False
) -> list[str]:
    """Tables of speeds and steps, with notes."""
    tokens = sum(answer.num_tokens for answer in trace.answers)
    lines = [
        HEAD,
        f"Trace: {len(trace.answers)} answers, {tokens} tokens, k = {trace.num_draft_tokens}; "
        f"{trace.source}",
        "",
        "speed-up over plain decoding (plain: tokens per second); ~ if row costs are extrapolated",
        *_table(results, by_kind, _speed, with_clairvoyant=True),
        "",
        "tokens per step / ms per step",
        *_table(results, by_kind, _step),
        "",
    ]
    for result in results:
        error = result.optimum_error
        text = f" (+- {100 * error:.1f})" if math.isfinite(error) else ""
        auto = f"auto reaches {100 * result.of_optimum:.1f}%{text} of the offline optimum"
        lines += [f"{result.machine.name}: {result.machine.curve.source}"]
        lines += [f"  {auto} ({result.optimum.name}); best fixed layout: {result.fixed[0]}"]
        lines += [f"  {note}" for note in result.machine.notes]
    return lines


def _table(
    results: Sequence[Simulation], by_kind: bool, cell: Cell, *, with_clairvoyant: bool = False
) -> list[str]:
    kinds = list(results[0].replays["plain"].kinds) if by_kind else []
    rows = [("", [*COLUMNS, *(["clairvoyant"] if with_clairvoyant else [])])]
    for result in results:
        cells = [cell(result, column, None) for column in COLUMNS]
        cells += [_clairvoyant(result)] if with_clairvoyant else []
        rows.append((result.machine.name, cells))
        rows += [
            (f"  {kind}", [cell(result, column, kind) for column in COLUMNS]) for kind in kinds
        ]
    width = max(len(name) for name, _ in rows) + 2
    return [name.ljust(width) + "".join(text.rjust(_WIDTH) for text in row) for name, row in rows]


def _speed(result: Simulation, column: str, kind: str | None) -> str:
    tally = result.columns()[column].tally(kind)
    if column == "plain":
        return f"{tally.tps:.1f}/s" if result.machine.in_ms else "1.00 x"
    mark = "~" if result.is_extrapolated(tally) else ""
    return f"{mark}{result.speedup(tally, kind):.2f} x"


def _step(result: Simulation, column: str, kind: str | None) -> str:
    tally = result.columns()[column].tally(kind)
    time = f"{tally.ms_per_step:.1f}" if result.machine.in_ms else "?"
    mark = "~" if result.is_extrapolated(tally) else ""
    return f"{mark}{tally.tokens_per_step:.2f}/{time}"


def _clairvoyant(result: Simulation) -> str:
    return f"{result.clairvoyant_tps / result.replays['plain'].total.tps:.2f} x"


def list_lines() -> list[str]:
    """The known chips with their sources."""
    lines = []
    for chip in chips().values():
        ratios = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in chip.ratios.items())
        lines += [f"{chip.name}: {chip.description}", f"  source: {chip.source}"]
        lines += [f"  rows: {ratios}"] + ([f"  {chip.note}"] if chip.note else [])
    return lines


def draw(results: Sequence[Simulation], path: Path) -> None:
    """Draw the speed-up of each mode on each machine, as a PNG file.

    Raises:
        ValueError: matplotlib is missing, or the file name does not end in .png.
        OSError: the file cannot be written.
    """
    if path.suffix != ".png":
        raise ValueError(f"{path} must end in .png")
    figure = figure_class()(figsize=(8, 1.2 + 0.5 * len(results)), layout="constrained")
    axes = figure.subplots()
    for index, mode in enumerate(_PLOTTED):
        heights = [row + (index - 1.5) * 0.2 for row in range(len(results))]
        widths = [result.speedup(result.columns()[mode].total) for result in results]
        axes.barh(heights, widths, height=0.18, label=mode)
    axes.set_yticks(range(len(results)), [result.machine.name for result in results])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="speed-up over plain decoding", title=HEAD)
    axes.legend()
    save_figure(figure, path, ["png"])
