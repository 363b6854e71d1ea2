"""``mlx-mtp benchmark`` on a tiny model: all modes, every output, bad input, Ctrl-C."""

from __future__ import annotations

import csv
import errno
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_mtp.bench import benchmark as flow
from mlx_mtp.bench import modes, tables
from mlx_mtp.calibration.stored_costs import SPECULATIONS
from mlx_mtp.cli import benchmark as cli_benchmark
from mlx_mtp.cli.main import cli
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.terminal import INTERRUPTED
from tests.helpers.tiny import save_tiny_model, save_tiny_pair

NUM_MODES = 5
LINES = [
    {"id": f"p{i}", "kind": ("odd", "even")[i % 2], "prompt": "ab cd " * (i + 1)} for i in range(4)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return save_tiny_pair(folder, num_hidden_layers=1, max_position_embeddings=512)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: Any) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


@pytest.fixture(autouse=True)
def nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    tune_nothing(monkeypatch)


def tune_nothing(patch: pytest.MonkeyPatch) -> None:
    """Row costs are default guesses; measuring them has its own tests."""

    def guess(model: Any, **_: Any) -> Speculation:
        known = SPECULATIONS.get(model) or Speculation.guess(model.num_draft_tokens)
        SPECULATIONS.set(model, known)
        return known

    patch.setattr(modes, "speculation_for", guess)
    patch.setattr(modes, "calibrate", guess)


def invoke(*args: Any) -> Result:
    return CliRunner().invoke(cli, ["benchmark", *map(str, args)])


def on_tiny(pair: tuple[Path, Path], prompts: Path, *args: Any) -> list[str]:
    model, adapter = pair
    arguments = ["--model", model, "--adapter-path", adapter, "--prompts", prompts]
    return [str(argument) for argument in [*arguments, "--max-tokens", 8, *args]]


def failure(*args: Any) -> str:
    done = invoke(*args)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture(scope="module")
def measured(
    pair: tuple[Path, Path], prompts: Path, tmp_path_factory: Any
) -> tuple[Result, dict[str, Any]]:
    """One run with everything: what the command printed, and the report that it wrote."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        tune_nothing(patch)
        done = invoke(
            *on_tiny(pair, prompts, "--modes", "plain,auto,quadratic:2,stock"),
            *("--draft-model", pair[0], "--contexts", "0,64", "--repeats", 2),
            *("--output-file", folder / "new" / "report.json"),
        )
    assert done.exit_code == 0, done.output
    assert [path.name for path in (folder / "new").iterdir()] == ["report.json"]
    return done, json.loads((folder / "new" / "report.json").read_text())


def test_every_answer_of_every_mode_is_there(measured: Any) -> None:
    _, report = measured
    assert report["status"] == "complete" and report["warmups"] == 2 * NUM_MODES
    assert [mode["name"] for mode in report["modes"]] == [
        "plain", "auto", "quadratic:2", "stock", "draft",
    ]  # fmt: skip
    places = {(a["prompt"], a["context"], a["repeat"], a["mode"]) for a in report["answers"]}
    assert len(places) == len(report["answers"]) == 4 * 2 * 2 * NUM_MODES
    assert [a["number"] for a in report["answers"]] == list(range(len(places)))
    for a in report["answers"]:
        assert 0 < a["tokens"] <= 8 and a["ttft_s"] > 0
        assert a["prompt_tokens"] >= a["context"]


def test_outputs_of_our_modes_and_of_mlx_lm_in_float32_are_equal(measured: Any) -> None:
    """On a CPU both are float32 here, and the draft model is the model itself."""
    _, report = measured
    outputs = report["outputs"]
    assert (outputs["reference"], outputs["compared"], outputs["different"]) == ("plain", 32, 0)
    assert set(outputs["others"]) == {"stock", "draft"}
    assert [counts["different"] for counts in outputs["others"].values()] == [0, 0]


def test_drafts_of_the_model_itself_are_always_accepted(measured: Any) -> None:
    _, report = measured
    rows = [r for r in report["figures"] if r["mode"] == "draft" and r["kind"] is None]
    assert len(rows) == 2
    for row in rows:
        assert row["held"] == row["verified"] and len(row["held"]) == modes.DRAFT_TOKENS
        assert row["tokens_per_step"] == 4.0


def test_steps_are_counted_with_their_masks(measured: Any) -> None:
    _, report = measured
    rows = [r for r in report["layouts"] if r["mode"] == "quadratic:2"]
    assert any(r["drafts"] and r["masks"] for r in rows)
    assert all(r["drafts"] <= 2 and r["masks"] <= 2 * (r["drafts"] + 1) for r in rows)
    plain = [r for r in report["layouts"] if r["mode"] == "plain"]
    assert {(r["drafts"], r["masks"]) for r in plain} == {(0, 0)}


def test_memory_and_sizes_are_reported(measured: Any) -> None:
    _, report = measured
    sizes = {mode["name"]: mode for mode in report["modes"]}
    assert sizes["stock"]["weight_bytes"] < sizes["plain"]["weight_bytes"]  # no adapter
    assert sizes["draft"]["weight_bytes"] == 2 * sizes["stock"]["weight_bytes"]
    assert len({mode["parameters"] for mode in report["modes"]}) == 1
    for row in report["figures"]:
        assert row["peak_memory_bytes"] > sizes[row["mode"]]["weight_bytes"]


def test_the_command_ends_in_one_json_line(measured: Any) -> None:
    done, report = measured
    assert done.stderr == ""
    *shown, last = done.stdout.splitlines()
    assert json.loads(last) == {key: value for key, value in report.items() if key != "answers"}
    assert sum(line.startswith("| ") for line in shown) >= 1 + 2 * 2 * NUM_MODES


@pytest.mark.parametrize("shape", ["md", "csv", "json", "jsonl"])
def test_each_output_on_stdout_and_in_a_file(
    measured: Any, shape: str, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = measured[1]
    monkeypatch.setattr(cli_benchmark, "_measure", lambda config: report)
    file = tmp_path / f"out.{shape}"
    done = invoke("--prompts", prompts, "--format", shape, "--output-file", file)
    assert done.exit_code == 0 and done.stdout == file.read_text()
    if shape == "json":
        assert json.loads(done.stdout) == report
    if shape == "csv":
        assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == 2 * len(report["figures"])


@pytest.mark.slow
def test_a_picture_of_what_was_measured(
    measured: Any, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli_benchmark, "_measure", lambda config: measured[1])
    done = invoke("--prompts", prompts, "--plot", tmp_path / "x.png")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.svg"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "x.svg").read_text()


def test_a_wrong_answer_is_reported(
    measured: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = measured[1]
    wrong = report | {"outputs": report["outputs"] | {"different": 1, "where": ["p1 (auto)"]}}
    monkeypatch.setattr(cli_benchmark, "_measure", lambda config: wrong)
    done = invoke("--prompts", prompts)
    assert "Answers that differ from plain: 1 of 32: p1 (auto)" in done.stdout
    assert done.stderr == "answers differ from plain decoding; see mlx-mtp verify\n"


def test_a_planted_wrong_id_is_caught(
    pair: tuple[Path, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id of one step of one mode is wrong."""
    right = modes.decode

    def wrong(model: Any, ids: list[int], **options: Any) -> Any:
        for number, step in enumerate(right(model, ids, **options)):
            if number == 1 and options["config"].layout == "linear":
                step = replace(step, tokens=[(step.tokens[0] + 1) % 260, *step.tokens[1:]])
            yield step

    monkeypatch.setattr(modes, "decode", wrong)
    args = on_tiny(pair, prompts, "--modes", "plain,linear,quadratic", "--num-prompts", 2)
    report = json.loads(invoke(*args, "--num-warmups", 0, "--format", "json").stdout)
    outputs = report["outputs"]
    assert (outputs["compared"], outputs["different"]) == (4, 2)
    assert {text.split()[1] for text in outputs["where"]} == {"(linear)"}


def test_a_full_disk_does_not_lose_the_figures(
    measured: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(cli_benchmark, "_measure", lambda config: measured[1])
    monkeypatch.setattr("mlx_mtp.storage.files.write_atomically", full)
    file = tmp_path / "x.json"
    done = invoke("--prompts", prompts, "--format", "json", "--output-file", file)
    assert done.exit_code == 2 and json.loads(done.stdout) == measured[1]
    assert done.stderr == f"Error: {file}: No space left on device\n"


def test_files_that_cannot_be_written_are_refused_first(
    prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = failure("--output-file", prompts / "x.json")
    assert error == f"Error: {prompts} is not a folder"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "mlx-mtp[bench]"' in failure("--plot", "x.png")


@pytest.mark.parametrize(("steps", "answers"), [(3, 0), (60, 1)])
def test_ctrl_c_prints_the_results_so_far(
    pair: tuple[Path, Path],
    prompts: Path,
    steps: int,
    answers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    run = flow.run

    def interrupted(prepared: Any, *, check: Any) -> Any:
        def counting() -> None:
            nonlocal calls
            calls += 1
            if calls > steps:
                raise KeyboardInterrupt

        return run(prepared, check=counting)

    monkeypatch.setattr(flow, "run", interrupted)
    args = on_tiny(pair, prompts, "--modes", "plain,linear", "--repeats", 99)
    done = invoke(*args, "--format", "json")
    assert done.exit_code == INTERRUPTED
    if not answers:
        assert done.stdout == "" and done.stderr.startswith("interrupted before the first")
        return
    report = json.loads(done.stdout)
    assert report["status"] == "interrupted" and report["answers"]
    counts = dict.fromkeys(("plain", "linear"), 0)
    for answer in report["answers"]:
        counts[answer["mode"]] += 1
    assert counts["plain"] == counts["linear"]


def test_plain_decoding_needs_no_adapter(pair: tuple[Path, Path], prompts: Path) -> None:
    base = ["--model", pair[0], "--prompts", prompts, "--num-prompts", 1, "--max-tokens", 2]
    done = invoke(*base, "--modes", "stock,plain", "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["model"]["adapter"] is None and report["cost_curve"] is None
    assert {row["mode"] for row in report["figures"] if "speedup" in row} == {"plain"}


@pytest.fixture(scope="module")
def repeating(tmp_path_factory: Any) -> Path:
    """A prompt whose answer by a random model repeats itself before long."""
    file = tmp_path_factory.mktemp("prompts") / "repeating.jsonl"
    file.write_text(json.dumps({"kind": "copy", "prompt": "ab cd " * 20}) + "\n")
    return file


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    return {row["mode"]: row for row in report["figures"] if row["kind"] is None}


def test_drafters_are_compared_in_one_run(pair: tuple[Path, Path], repeating: Path) -> None:
    names = "plain,auto,mask,lookup,mask:2,lookup:2"
    args = on_tiny(pair, repeating, "--max-tokens", 64, "--modes", names)
    done = invoke(*args, "--num-warmups", 0, "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = figures_of(report)
    assert list(rows) == names.split(",") and report["model"]["drafters"] == ["mask", "lookup"]
    assert (report["outputs"]["compared"], report["outputs"]["different"]) == (5, 0)
    assert rows["plain"]["drafters"] == {} and set(rows["auto"]["drafters"]) <= {"mask", "lookup"}
    for name in ("mask", "lookup", "mask:2", "lookup:2"):
        assert set(rows[name]["drafters"]) <= {name.partition(":")[0]}, name
    for name in ("mask:2", "lookup:2"):
        counts = rows[name]["drafters"][name.partition(":")[0]]
        assert 0 <= counts["accepted"] <= counts["verified"] > 0
    lookup = rows["lookup:2"]
    pairs = [(lookup["lookup_verified"], lookup["lookup_held"])]
    assert pairs == [tuple(lookup["drafters"]["lookup"].values())]
    assert max(row["drafts"] for row in report["layouts"] if ":2" in row["mode"]) == 2
    shown = tables.render(report, "md").splitlines()
    title = shown.index("Drafts by drafter:")
    assert any(line.startswith("| lookup:2") for line in shown[title:])


def test_without_an_adapter_there_is_lookup(pair: tuple[Path, Path], repeating: Path) -> None:
    bundle = ["--model", pair[0], "--prompts", repeating, "--max-tokens", 64]
    args = [*bundle, "--num-warmups", 0, "--no-adapter", "--format", "json"]
    done = invoke(*args, "--modes", "plain,auto,lookup:4")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = figures_of(report)
    assert report["model"]["adapter"] is None and report["model"]["drafters"] == ["lookup"]
    assert report["outputs"]["different"] == 0 and report["outputs"]["compared"] == 2
    assert rows["lookup:4"]["drafters"]["lookup"]["verified"] > 0
    assert set(rows["auto"]["drafters"]) <= {"lookup"}


MISSING = {
    "mask": "mode mask: drafter is mask, but {} has no adapter with mask tokens",
    "mask:2": "mode mask:2: drafter is mask, but {} has no adapter with mask tokens",
    "native": "mode native: drafter is native, but {} has no MTP modules of its own",
    "heads:3": "mode heads:3: drafter is heads, but {} has no adapter with heads",
    "linear": "mode linear: {} has no drafter that drafts in every step",
    "quadratic:2": "mode quadratic:2: {} has no drafter that drafts in every step",
}


@pytest.mark.parametrize(("mode", "message"), MISSING.items())
def test_a_mode_without_its_means(
    pair: tuple[Path, Path], prompts: Path, mode: str, message: str
) -> None:
    error = failure("--model", pair[0], "--prompts", prompts, "--modes", f"plain,{mode}")
    assert error == f"Error: {message.format(pair[0])}"


def test_an_adapter_that_is_named_must_not_be_left_out(
    pair: tuple[Path, Path], prompts: Path
) -> None:
    error = failure(*on_tiny(pair, prompts, "--no-adapter"))
    assert error == f"Error: adapter_path is {pair[1]}, but adapter is False"


def test_a_bad_line_of_the_prompts_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": 7}\n')
    error = failure("--prompts", file)
    assert error == f"Error: {file}, line 2: 'prompt' must be a string, got 7"


BAD = {
    "repeats": (["--repeats", "0"], "--repeats"),
    "max tokens": (["--max-tokens", "1"], "--max-tokens"),
    "limit": (["--num-prompts", "0"], "--num-prompts"),
    "contexts": (["--contexts", "0,many"], "'0,many' is not a list of numbers"),
    "no context": (["--contexts", ","], "--contexts is empty"),
    "context": (["--contexts", "-5"], "-5 is less than the minimum, 0"),
    "mode": (["--modes", "plain,fast"], "unknown mode 'fast'; modes: plain, auto"),
    "twice": (["--modes", "plain,plain"], "mode plain is given twice"),
    "none": (["--modes", ""], "no mode is given"),
    "draft": (["--modes", "plain,draft"], "mode draft needs --draft-model"),
    "kind": (["--kinds", "poems"], "kinds must be among chat, code"),
    "prompts": (["--prompts", "no-such.jsonl"], "no-such.jsonl: No such file"),
    "output": (["--format", "xml"], "'xml' is not one of"),
    "file": (["--output-file", "x.txt"], "must end in .md, .csv, .json or .jsonl"),
    "picture": (["--plot", "x.pdf"], "must end in .png or .svg"),
    "compare": (["--compare", "a.json"], "requires 2 arguments"),
    "both": (
        ["--compare", "a.json", "b.json", "--plot", "x.png"],
        "cannot be combined with --compare",
    ),
    "absent": (["--compare", "a.json", "b.json"], "a.json: No such file"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_one_clear_line(args: list[str], message: str) -> None:
    assert message in failure(*args)


def test_contexts_beyond_the_models_are_one_clear_line(
    pair: tuple[Path, Path], prompts: Path
) -> None:
    error = failure(*on_tiny(pair, prompts, "--contexts", "0,504"))
    assert "504 tokens of text and 8 of answer do not fit into" in error
    assert "which is 512" in error
    error = failure(*on_tiny(pair, prompts, "--contexts", "400"))
    assert "prompt p3 after 400 tokens of text has" in error


def test_more_drafts_than_the_adapter_has(pair: tuple[Path, Path], prompts: Path) -> None:
    error = failure(*on_tiny(pair, prompts, "--num-draft-tokens", 9))
    assert error == ("Error: mode auto: num_draft_tokens is 9, but the adapter was trained for 4")
    error = failure(*on_tiny(pair, prompts, "--modes", "plain,mask:5"))
    assert "mode mask:5: num_draft_tokens is 5, but the adapter was trained for 4" in error


@pytest.mark.parametrize("modes", ["plain,auto", "plain"])
def test_a_draft_model_with_another_tokenizer(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path, modes: str
) -> None:
    folder = save_tiny_model(tmp_path / "draft", num_hidden_layers=1)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<user>", "<you>"), encoding="utf-8")
    args = on_tiny(pair, prompts, "--modes", modes, "--draft-model")
    assert "needs the same tokenizer as the model, but it has no" in failure(*args, folder)
    assert "nowhere does not exist" in failure(*args, tmp_path / "nowhere")


def test_a_draft_model_drafts_in_our_modes_too(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "draft", num_hidden_layers=1, max_position_embeddings=512)
    base = ["--model", pair[0], "--prompts", prompts, "--num-prompts", 1, "--max-tokens", 8]
    modes = "plain,linear:2,draft-model,draft-model:3"
    args = [*base, "--draft-model", folder, "--modes", modes, "--repeats", 1]
    done = invoke(*args, "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    answers = {answer["mode"]: answer for answer in report["answers"]}
    assert list(answers) == modes.split(",")
    rows = figures_of(report)
    assert rows["linear:2"]["tokens_per_step"] > 2.5  # of 3: it is the model itself
    counts = rows["draft-model:3"]["drafters"]["draft-model"]
    assert counts["verified"] == counts["accepted"] > 0
    assert report["model"]["drafters"] == ["draft-model", "lookup"]
    assert report["outputs"]["different"] == 0
