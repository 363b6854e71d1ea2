"""A report as text: tables like those of llama-bench, CSV, JSON, JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from mlx_mtp.bench.report import INTERRUPTED, without_answers
from mlx_mtp.bench.summary import acceptance_rates

FORMATS = ("md", "csv", "json", "jsonl")
ALL = "all"  # name of all kinds together
_HEAD = (
    "model", "size", "params", "backend", "threads", "test", "t/s", "ttft p50 / p99 ms",
    "tok/step", "speed-up",
)  # fmt: skip
_DRAFTERS = ("mode", "drafter", "verified", "accepted", "accepted, %")
_KINDS = ("kind", "mode", "prompts", "t/s", "tok/step", "speed-up", "accepted by position, %")


def render(report: dict[str, Any], output_format: str) -> str:
    """Return a report in one of ``FORMATS``, without a newline at its end.

    ``md`` has tables, notes, and the report without its answers as the last line; ``csv`` and
    ``jsonl`` have a line for each test (``flat_rows``), and ``jsonl`` ends in the report without
    its answers; ``json`` is the whole report in one line.
    """
    if output_format == "json":
        return dump(report)
    if output_format == "csv":
        return as_csv(flat_rows(report))
    last = dump(without_answers(report))
    if output_format == "jsonl":
        return "\n".join([*(dump(row) for row in flat_rows(report)), last])
    return "\n".join([*_markdown(report), "", last])


def dump(values: Any) -> str:
    """Return values as one line of JSON."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows with the same keys as CSV, with unrounded numbers; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def flat_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a flat row for each test: prompt (``pp``) and generation (``tg``) of each cell."""
    return [row for cell in report["figures"] for row in _tests(report, cell)]


def _tests(report: dict[str, Any], cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of both tests of a cell."""
    mode = next(mode for mode in report["modes"] if mode["name"] == cell["mode"])
    common = {
        "model": report["model"]["name"],
        "size_bytes": mode["weight_bytes"],
        "parameters": mode["parameters"],
        "backend": report["machine"]["backend"],
        "threads": report["machine"]["threads"],
        "machine": report["machine"]["name"],
        "date": report["date"],
        "status": report["status"],
    }
    limit = report["settings"]["max_tokens"]
    return [common | _test(cell, test, limit) for test in ("pp", "tg")]


def _test(cell: dict[str, Any], test: str, limit: int) -> dict[str, Any]:
    is_prompt = test == "pp"
    tps = "prompt_tps" if is_prompt else "tps"
    depth = f" @ d{cell['context']}" if cell["context"] and not is_prompt else ""
    count = round(cell["prompt_tokens"]) if is_prompt else limit
    generation = {
        name: None if is_prompt else cell.get(name)
        for name in (
            "tokens_per_step", "median_tps", "speedup", "speedup_low", "speedup_high",
            "median_speedup", "peak_memory_bytes", "joules_per_token",
        )
    }  # fmt: skip
    rates = [] if is_prompt else acceptance_rates(cell)
    return {
        "test": f"{test}{count}{depth} ({cell['mode']})",
        "measure": test,
        "context": cell["context"],
        "kind": cell["kind"] or ALL,
        "mode": cell["mode"],
        "prompts": cell["prompts"],
        "answers": cell["answers"],
        "tps": cell[tps],
        "tps_sd": cell[f"{tps}_sd"],
        "ttft_p50_ms": cell["ttft_p50_ms"] if is_prompt else None,
        "ttft_p99_ms": cell["ttft_p99_ms"] if is_prompt else None,
        **generation,
        "held_by_position": " ".join(f"{rate:.3f}" for rate in rates),
        "drafters": "" if is_prompt else _drafters(cell),
    }


def _drafters(cell: dict[str, Any]) -> str:
    """Accepted and verified drafts by drafter, in a field."""
    pairs = cell["drafters"].items()
    return " ".join(f"{source}={c['accepted']}/{c['verified']}" for source, c in pairs)


def _markdown(report: dict[str, Any]) -> list[str]:
    totals = [cell for cell in report["figures"] if cell["kind"] is None]
    rows = [row for cell in totals for row in _tests(report, cell)]
    lines = markdown(_HEAD, [_cells(row) for row in rows])
    for cells in _by_context(totals):
        if drafts := [line for cell in cells for line in _drafter_cells(cell)]:
            title = _after("Drafts by drafter", cells[0])
            lines += ["", title, "", *markdown(_DRAFTERS, drafts, left=2)]
    kinds = [cell for cell in report["figures"] if cell["kind"] is not None]
    for cells in _by_context(kinds):
        title = _after("By kind of text", cells[0])
        lines += ["", title, "", *markdown(_KINDS, [_kind_cells(cell) for cell in cells], left=2)]
    return [*lines, "", *(f"- {note}" for note in notes(report))]


def _by_context(cells: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell["context"], []).append(cell)
    return list(groups.values())


def _after(title: str, cell: dict[str, Any]) -> str:
    return f"{title}, after {cell['context']} tokens:" if cell["context"] else f"{title}:"


def _drafter_cells(cell: dict[str, Any]) -> list[list[str]]:
    """A row for each drafter of a mode."""
    return [
        [
            cell["mode"],
            source,
            str(counts["verified"]),
            str(counts["accepted"]),
            f"{100 * counts['accepted'] / counts['verified']:.1f}",
        ]
        for source, counts in cell["drafters"].items()
        if counts["verified"]
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    ttft = row["ttft_p50_ms"], row["ttft_p99_ms"]
    return [
        row["model"].replace("|", "/"),
        size(row["size_bytes"]),
        f"{row['parameters'] / 1e6:.2f} M",
        row["backend"],
        str(row["threads"]),
        row["test"],
        speed(row["tps"], row["tps_sd"]),
        "" if None in ttft else "{:.1f} / {:.1f}".format(*ttft),
        number(row["tokens_per_step"]),
        speedup(row),
    ]


def _kind_cells(cell: dict[str, Any]) -> list[str]:
    return [
        cell["kind"].replace("|", "/"),
        cell["mode"],
        str(cell["prompts"]),
        speed(cell["tps"], cell["tps_sd"]),
        number(cell["tokens_per_step"]),
        speedup(cell),
        " ".join(f"{100 * rate:.0f}" for rate in acceptance_rates(cell)),
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return the lines of a Markdown table that is aligned in plain text too.

    Empty columns stay, so that tables of several runs have the same columns.

    Args:
        head: names of the columns.
        rows: cells of each row.
        left: number of columns that are aligned left; the others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    ruler = [
        "-" * (width + 2) if column < left else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    ]
    return [line(head), "|" + "|".join(ruler) + "|", *map(line, rows)]


def size(count: float) -> str:
    """Format bytes as llama-bench does."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def number(value: float | None) -> str:
    """Format a number with two decimals; None is empty."""
    return "" if value is None else f"{value:.2f}"


def speed(tps: float | None, deviation: float | None) -> str:
    """Format tokens per second, with their standard deviation between passes, if any."""
    return number(tps) + ("" if deviation is None else f" ± {deviation:.2f}")


def speedup(cell: dict[str, Any]) -> str:
    """Format a speed-up and its interval."""
    if cell.get("speedup") is None:
        return ""
    low, high = cell["speedup_low"], cell["speedup_high"]
    return f"{cell['speedup']:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def notes(report: dict[str, Any]) -> list[str]:
    """Return the notes below the tables."""
    base = report["modes"][0]["name"]
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"{machine['name']}, {machine['system']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"Speed-up: all tokens divided by all seconds, relative to {base} on the same prompts, "
        "interleaved; the 95% confidence interval over prompts is in brackets.",
        *_output_notes(report["outputs"]),
        *_memory_notes(report),
    ]
    if report["drift"] is not None:
        lines.append(
            f"Drift: speed of {base} at the end divided by that at the start: {report['drift']:.3f}"
        )
    if report["power"] != "read":
        lines.append(f"Power: {report['power']}.")
    if report["status"] == INTERRUPTED:
        lines.append("INTERRUPTED: the figures cover only the answers before the interruption.")
    return lines


def _output_notes(outputs: dict[str, Any]) -> list[str]:
    lines = []
    reference = outputs["reference"]
    if outputs["compared"]:
        where = f": {', '.join(outputs['where'])}" if outputs["where"] else ""
        lines.append(
            f"Answers that differ from {reference}: {outputs['different']} of "
            f"{outputs['compared']}{where}"
        )
    for mode, counts in outputs["others"].items():
        lines.append(
            f"Answers of {mode} that differ from {reference}: {counts['different']} of "
            f"{counts['compared']} (expected, as its weights or kernels round differently)"
        )
    return lines


def _memory_notes(report: dict[str, Any]) -> list[str]:
    peaks: dict[str, int] = {}
    joules = {}
    for cell in report["figures"]:
        peaks[cell["mode"]] = max(peaks.get(cell["mode"], 0), cell["peak_memory_bytes"])
        if cell["kind"] is None and cell["joules_per_token"] is not None:
            joules[cell["mode"]] = cell["joules_per_token"]
    text = ", ".join(f"{mode} {size(peak)}" for mode, peak in peaks.items())
    before, after = (report["swap_bytes"][when] for when in ("before", "after"))
    swap = "not readable" if None in (before, after) else f"{size(before)} to {size(after)}"
    lines = [f"Peak memory: {text}; swap in use, before and after: {swap}"]
    if working_set := report["machine"]["recommended_working_set_bytes"]:
        limit = report["machine"]["wired_limit_mb"]
        wired = "not readable" if limit is None else f"{limit} MB (0: the system's default)"
        lines.append(f"Recommended working set: {size(working_set)}; wired limit: {wired}")
    if joules:
        text = ", ".join(f"{mode} {value:.2f}" for mode, value in joules.items())
        lines.append(f"Energy of the processor in joules per token: {text}")
    return lines
