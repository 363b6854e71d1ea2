"""Reports as tables, files and pictures, and the comparison of two."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.bench import compare, tables
from mlx_mtp.bench.measure import Measurement
from mlx_mtp.bench.modes import Mode
from mlx_mtp.bench.report import Setup, build_report
from mlx_mtp.bench.settings import Settings
from mlx_mtp.cli.main import cli
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.planning.costs import GPU_GUESS
from tests.helpers.benchmark_answers import WEIGHTS, pairs

SPEEDUPS = [1.1, 1.5, 2.0, 0.9, 1.3, 1.7, 1.2, 1.4, 1.6, 1.0]


def made(
    speedups: list[float] = SPEEDUPS, *, seed: int = 0, repeats: int = 1, interrupted: bool = False
) -> dict[str, Any]:
    """A report of made-up answers."""
    setup = Setup(
        model={"name": "tiny", "fingerprint": "f" * 64, "adapter": None},
        modes=[
            Mode(name, lambda ids, check: iter([]), True, 500_000, size)
            for name, size in WEIGHTS.items()
        ],
        prompts=[Prompt(f"p{at}", "chat", "x") for at in range(len(speedups))],
        source="builtin",
        contexts=(0,),
        filler=None,
        settings=Settings(repeats=repeats),
        decoding={"max_tokens": 96},
        seed=0,
        cost_curve=GPU_GUESS.to_dict(),
    )
    answers = pairs(speedups, noise=0.05, seed=seed, repeats=repeats)
    measured = Measurement(answers=answers, warmups=2, seconds=9.0, interrupted=interrupted)
    return build_report(setup, measured, swap_bytes=(0, None), no_power="not readable: a test")


def same(one: Any, other: Any) -> bool:
    return json.loads(json.dumps(one)) == json.loads(json.dumps(other))


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_json_is_the_whole_report_in_one_line():
    report = made()
    line = tables.render(report, "json")
    assert "\n" not in line and same(json.loads(line), report)
    assert len(json.loads(line)["answers"]) == 2 * len(SPEEDUPS)


def test_all_numbers_are_finite():
    report = made()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for shape in ("json", "jsonl"):
        for line in tables.render(report, shape).split("\n"):
            json.loads(line, parse_constant=refuse)
    with pytest.raises(ValueError):
        tables.dump({"x": math.nan})


def test_csv_and_json_lines_hold_the_same_rows():
    report = made(repeats=2)
    rows = tables.flat_rows(report)
    read = list(csv.DictReader(io.StringIO(tables.render(report, "csv"))))
    *lines, last = map(json.loads, tables.render(report, "jsonl").split("\n"))
    assert same(lines, rows) and "answers" not in last and last["figures"]
    assert len(read) == len(rows) == 2 * len(report["figures"])
    for text, row in zip(read, rows, strict=True):
        assert text.keys() == row.keys()
        for key, value in row.items():
            shown = text[key]
            assert shown == "" if value is None else type(value)(shown) == value


def test_the_table_has_llama_benchs_shape_and_is_aligned():
    report = made(repeats=2)
    lines = tables.render(report, "md").split("\n")
    ends = [at for at, line in enumerate(lines) if not line.startswith("|")]
    head, rule, *rows = lines[: ends[0]]
    assert cells_of(head)[:7] == [
        "model", "size", "params", "backend", "threads", "test", "t/s",
    ]  # fmt: skip
    assert len({len(line) for line in lines[: ends[0]]}) == 1
    assert len({tuple(at for at, c in enumerate(line) if c == "|") for line in [head, *rows]}) == 1
    assert set(rule) <= set("|-:")
    tests = [cells_of(row)[5] for row in rows]
    assert tests == ["pp20 (plain)", "tg96 (plain)", "pp20 (auto)", "tg96 (auto)"]
    auto = cells_of(rows[3])
    cell = next(c for c in report["figures"] if c["kind"] is None and c["mode"] == "auto")
    assert auto[6] == f"{cell['tps']:.2f} ± {cell['tps_sd']:.2f}"
    assert auto[9] == (
        f"{cell['speedup']:.2f} [{cell['speedup_low']:.2f}, {cell['speedup_high']:.2f}]"
    )
    assert auto[8] == "1.83" and cells_of(rows[2])[7] == "500.0 / 500.0"
    assert same(json.loads(lines[-1]), {k: v for k, v in report.items() if k != "answers"})


def test_notes():
    text = "\n".join(tables.notes(made()))
    assert "Answers that differ from plain: 0 of 10" in text
    assert "swap in use, before and after: not readable" in text
    assert "Power: not readable: a test." in text and "INTERRUPTED" not in text
    assert "INTERRUPTED" in "\n".join(tables.notes(made(interrupted=True)))


def test_kinds_have_a_table_of_their_own():
    lines = tables.render(made(), "md").split("\n")
    at = lines.index("By kind of text:")
    rows = [cells_of(line) for line in lines[at + 4 : at + 8]]
    assert [row[:3] for row in rows] == [
        [kind, mode, "5"] for kind in ("chat", "code") for mode in WEIGHTS
    ]
    assert rows[1][-1] == "80 25"


def test_context_is_part_of_the_tests_name():
    report = made()
    for cell in report["figures"]:
        cell["context"] = 2048
    tests = [row["test"] for row in tables.flat_rows(report)]
    assert tests[:2] == ["pp20 (plain)", "tg96 @ d2048 (plain)"]


@pytest.mark.parametrize(
    ("count", "shown"), [(2**20, "1.00 MiB"), (2**30, "1.00 GiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes(count, shown):
    assert tables.size(count) == shown


def test_a_report_compared_with_itself():
    report = made()
    rows = compare.compare(report, report)
    assert len(rows) == len(report["figures"])
    assert {row["ratio"] for row in rows} == {1.0}
    assert {row["overlap"] for row in rows if row["mode"] == "plain"} == {None}
    assert {row["overlap"] for row in rows if row["mode"] == "auto"} == {True}
    assert compare.warnings(report, report) == []


def test_a_faster_build_is_seen():
    slow, fast = made(), made([3 * speedup for speedup in SPEEDUPS], seed=1)
    whole = next(
        row for row in compare.compare(slow, fast) if row["kind"] is None and row["mode"] == "auto"
    )
    assert whole["ratio"] == pytest.approx(whole["tps_b"] / whole["tps_a"])
    assert whole["ratio"] > 2.5 and whole["overlap"] is False


@pytest.mark.parametrize("shape", tables.FORMATS)
def test_a_comparison_in_each_shape(shape):
    one, other = made(), made(seed=1)
    rows, notes = compare.compare(one, other), ["the adapters differ"]
    text = compare.render(rows, notes, shape)
    if shape == "json":
        assert same(json.loads(text), {"rows": rows, "warnings": notes})
    elif shape == "jsonl":
        *lines, last = map(json.loads, text.split("\n"))
        assert same(lines, rows) and last == {"warnings": notes}
    elif shape == "csv":
        assert len(list(csv.DictReader(io.StringIO(text)))) == len(rows)
    else:
        lines = text.split("\n")
        assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1


def test_a_report_from_before_drafters_were_counted_can_be_compared():
    old, new = copy.deepcopy(made()), made(seed=1)
    for cell in old["figures"]:
        del cell["drafters"]
    new["model"] |= {"drafters": ["lookup"]}
    assert len(compare.compare(old, new)) == len(new["figures"])
    assert compare.warnings(old, new) == []


def test_drafters_have_a_table_of_their_own():
    report = made()
    assert "Drafts by drafter:" not in tables.render(report, "md").split("\n")
    whole = next(c for c in report["figures"] if c["kind"] is None and c["mode"] == "auto")
    whole["drafters"] = {
        "mask": {"verified": 60, "accepted": 50},
        "lookup": {"verified": 32, "accepted": 31},
        "native": {"verified": 0, "accepted": 0},
    }
    lines = tables.render(report, "md").split("\n")
    at = lines.index("Drafts by drafter:")
    assert [cells_of(line) for line in lines[at + 4 : at + 6]] == [
        ["auto", "mask", "60", "50", "83.3"],
        ["auto", "lookup", "32", "31", "96.9"],
    ]
    assert lines[at + 6] == ""
    row = next(r for r in tables.flat_rows(report) if r["drafters"])
    assert (row["mode"], row["kind"], row["measure"]) == ("auto", "all", "tg")
    assert row["drafters"] == "mask=50/60 lookup=31/32 native=0/0"


def changed(report: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    other = copy.deepcopy(report)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return other


def test_other_models_and_prompts_are_refused():
    report = made()
    with pytest.raises(ValueError, match="different models: tiny in A, tiny in B"):
        compare.compare(report, changed(report, "model", "fingerprint", to="0"))
    with pytest.raises(ValueError, match="different sets of prompts: builtin in A"):
        compare.compare(report, changed(report, "prompts", "sha256", to="0"))
    elsewhere = copy.deepcopy(report)
    for cell in elsewhere["figures"]:
        cell["context"] = 1
    with pytest.raises(ValueError, match="no context and mode in common"):
        compare.compare(report, elsewhere)


def test_other_machines_and_settings_are_warned_of():
    report = made()
    other = changed(report, "machine", "name", to="another")
    other = changed(other, "settings", "max_tokens", to=16)
    other = changed(other, "versions", "mlx", to="9")
    other = changed(other, "status", to="interrupted")
    other["modes"].reverse()
    text = "\n".join(compare.warnings(report, other))
    for part in ("another in B", "max_tokens 96 in A, 16 in B", "mlx ", "B was interrupted"):
        assert part in text
    assert "over plain in A, over auto in B" in text


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(cli, ["benchmark", *map(str, args)])


def test_two_files_by_the_command(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(tables.render(made(), "json"))
    last = tables.render(made(seed=1), "md").split("\n")[-1]
    files[1].write_text(json.dumps(json.loads(last) | {"status": "interrupted"}))
    done = invoke("--compare", *files, "--output-file", tmp_path / "both.csv")
    assert done.exit_code == 0, done.output
    assert done.stderr == "warning: B was interrupted\n"
    assert done.stdout.splitlines()[0].startswith("| context | kind")
    assert len((tmp_path / "both.csv").read_text().splitlines()) == 7


DAMAGE = {
    "not JSON": (None, "is not a JSON file"),
    "a list": ([], "is not a report of mlx-mtp benchmark"),
    "another": ({"benchmark": "x"}, "is not a report of mlx-mtp benchmark"),
    "schema": ({"benchmark": "mlx-mtp", "schema": 99}, "has schema 99, this version reads 1"),
    "empty": ({"benchmark": "mlx-mtp", "schema": 1}, "is damaged: 'model' is missing"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_file_that_is_no_report(tmp_path: Path, content: Any, message: str):
    file = tmp_path / "bad.json"
    file.write_text("{" if content is None else json.dumps(content))
    done = invoke("--compare", file, file)
    assert done.exit_code == 2 and done.stderr == f"Error: {file} {message}\n"


@pytest.mark.parametrize("key", ["model", "prompts", "settings", "machine", "versions", "figures"])
@pytest.mark.parametrize("value", [None, [], {}, 3])
def test_a_damaged_report_is_refused_or_read(tmp_path: Path, key: str, value: Any):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(made() | {key: value}))
    done = invoke("--compare", file, file)
    assert done.exit_code == 2 or value == {}, done.output
    assert done.exit_code in (0, 2) and "Traceback" not in done.output
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.slow
def test_a_picture_of_a_report_is_the_same_again(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from mlx_mtp.bench.benchmark_figures import draw_report

    for folder in "ab":
        files = draw_report(made(), tmp_path / folder / "x.png")
        assert [file.name for file in files] == ["x.png", "x.svg"]
    for name in ("x.png", "x.svg"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert one == two and len(one) > 5000
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.png", "x.svg"]
