"""Compares two reports: whether a change made decoding faster, and how certain that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_mtp.bench import machine_state, tables
from mlx_mtp.bench.report import COMPLETE, SCHEMA

_HEAD = (
    "context", "kind", "mode", "t/s A", "t/s B", "B / A", "speed-up A", "speed-up B", "overlap",
)  # fmt: skip
_REQUIRED = {"model": dict, "prompts": dict, "settings": dict, "machine": dict, "versions": dict}
_CELL = {"context": int, "mode": str}
_SPEEDS = ("tps", "speedup", "speedup_low", "speedup_high")


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of ``mlx-mtp benchmark``.

    Args:
        path: output of ``--format json`` or ``--output-file FILE.json``, or the last line of the
            other formats.

    Raises:
        ValueError: the file is not a report, or one of another version.
        OSError: it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise ValueError(f"{path} is not a JSON file") from None
    if not isinstance(report, dict) or report.get("benchmark") != "mlx-mtp":
        raise ValueError(f"{path} is not a report of mlx-mtp benchmark")
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {report.get('schema')!r}, this version reads {SCHEMA}")
    if damage := _damage(report):
        raise ValueError(f"{path} is damaged: {damage}")
    return report


def _damage(report: dict[str, Any]) -> str:
    """Description of what is missing from a report, or ""."""
    for name, kind in _REQUIRED.items():
        if not isinstance(report.get(name), kind):
            return f"{name!r} is missing"
    for place, key in (("model", "fingerprint"), ("prompts", "sha256")):
        if not isinstance(report[place].get(key), str):
            return f"{key!r} is missing from {place!r}"
    cells, modes = report.get("figures"), report.get("modes")
    if not isinstance(cells, list) or not isinstance(modes, list) or not cells or not modes:
        return "there are no figures"
    if not isinstance(modes[0], dict) or not isinstance(modes[0].get("name"), str):
        return "a mode has no name"
    return "" if all(_is_cell(cell) for cell in cells) else "a figure is invalid"


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict):
        return False
    named = all(isinstance(cell.get(key), kind) for key, kind in _CELL.items())
    numbers = all(isinstance(cell.get(key), int | float | None) for key in _SPEEDS)
    return named and numbers and isinstance(cell.get("kind"), str | None)


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the figures that both reports have, by context, kind of text and mode.

    Args:
        one: A.
        other: B.

    Returns:
        Rows with both speeds, their ratio B / A, both speed-ups with their intervals, and whether
        the intervals overlap (None without intervals).

    Raises:
        ValueError: the reports are of different models or prompts, or have nothing in common.
    """
    for part, key, name, what in (
        ("model", "fingerprint", "name", "models"),
        ("prompts", "sha256", "from", "sets of prompts"),
    ):
        if one[part][key] != other[part][key]:
            names = f"{one[part].get(name)} in A, {other[part].get(name)} in B"
            raise ValueError(f"the reports are of different {what}: {names}")
    cells = {_place(cell): cell for cell in other["figures"]}
    rows = [_row(cell, cells[_place(cell)]) for cell in one["figures"] if _place(cell) in cells]
    if not rows:
        raise ValueError("the reports have no context and mode in common")
    return rows


def _place(cell: dict[str, Any]) -> tuple[Any, Any, Any]:
    return cell["context"], cell["kind"], cell["mode"]


def _row(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    ratio = b["tps"] / a["tps"] if a.get("tps") and b.get("tps") else None
    row = {"context": a["context"], "kind": a["kind"], "mode": a["mode"]}
    for name in _SPEEDS:
        row |= {f"{name}_a": a.get(name), f"{name}_b": b.get(name)}
    ends = [row[f"speedup_{end}_{side}"] for end in ("low", "high") for side in ("a", "b")]
    overlap = None
    if None not in ends:
        overlap = max(ends[0], ends[1]) <= min(ends[2], ends[3])
    return row | {"ratio": ratio, "overlap": overlap}


def warnings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return a line for each difference that weakens the comparison."""
    lines = machine_state.differences(one["machine"], other["machine"])
    for part in ("versions", "settings"):
        names = sorted({*one[part], *other[part]})
        lines += [
            f"{name} {one[part].get(name)} in A, {other[part].get(name)} in B"
            for name in names
            if one[part].get(name) != other[part].get(name)
        ]
    bases = [report["modes"][0]["name"] for report in (one, other)]
    if bases[0] != bases[1]:
        lines.append(f"speed-ups are over {bases[0]} in A, over {bases[1]} in B")
    if one["model"].get("adapter") != other["model"].get("adapter"):
        lines.append("the adapters differ")
    for name, report in (("A", one), ("B", other)):
        if report.get("status") != COMPLETE:
            lines.append(f"{name} was interrupted")
    return lines


def render(rows: Sequence[dict[str, Any]], notes: Sequence[str], output_format: str) -> str:
    """Return a comparison in one of ``tables.FORMATS``.

    Args:
        rows: from ``compare``.
        notes: from ``warnings``; part of ``json`` and of the last line of ``jsonl``.
        output_format: the format.
    """
    if output_format == "csv":
        return tables.as_csv(rows)
    if output_format == "json":
        return tables.dump({"rows": rows, "warnings": notes})
    if output_format == "jsonl":
        return "\n".join(tables.dump(row) for row in [*rows, {"warnings": notes}])
    return "\n".join(tables.markdown(_HEAD, [_cells(row) for row in rows], left=3))


def _cells(row: dict[str, Any]) -> list[str]:
    def speedup(side: str) -> str:
        names = ("speedup", "speedup_low", "speedup_high")
        return tables.speedup({name: row[f"{name}_{side}"] for name in names})

    return [
        str(row["context"]),
        (row["kind"] or tables.ALL).replace("|", "/"),
        row["mode"],
        tables.number(row["tps_a"]),
        tables.number(row["tps_b"]),
        "" if row["ratio"] is None else f"{row['ratio']:.3f}",
        speedup("a"),
        speedup("b"),
        {None: "", True: "yes", False: "no"}[row["overlap"]],
    ]
