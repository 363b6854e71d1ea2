"""The benchmarks of adapters: kept texts, tokens per step by kind, figures and ablations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation import greedy_texts as room
from mlx_mtp.evaluation.acceptance import evaluate
from mlx_mtp.evaluation.greedy_texts import GreedyText, greedy_texts, texts_hash
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.lab import ablations, reproduction, tokens_per_step
from mlx_mtp.lab.figures import draw_lines
from mlx_mtp.loading import load
from tests.helpers.tiny import save_tiny_pair

FORMATS = ("png", "svg")
PROMPTS = [
    Prompt(f"p{number}", "odd" if number % 2 else "even", "ab cd " * (number + 1))
    for number in range(5)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> tuple[Path, Path]:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def loaded(pair: tuple[Path, Path]) -> Any:
    return load(str(pair[0]), adapter_path=str(pair[1]))


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    lines = [{"id": p.id, "kind": p.kind, "text": p.text} for p in PROMPTS]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_texts_are_those_of_decoding(loaded: Any) -> None:
    model, tokenizer = loaded
    for text in greedy_texts(
        model, tokenizer, PROMPTS, encode=prompt_ids, max_tokens=12, batch_size=2
    ):
        stop_ids = tokenizer.eos_token_ids
        steps = list(decode(model, text.prompt, max_tokens=12, stop_ids=stop_ids))
        assert text.answer == [token for step in steps for token in step.tokens]
        found = evaluate(model, [text.sequence], num_draft_tokens=1)
        assert found.num_tokens == len(text.answer)
        quadratic: dict[str, Any] = {"layout": "quadratic", "num_draft_tokens": 1}
        again = decode(model, text.prompt, max_tokens=12, stop_ids=stop_ids, **quadratic)
        assert found.num_steps == len(list(again))


def test_a_stop_id_is_the_last_of_its_text(loaded: Any, monkeypatch: Any) -> None:
    model, tokenizer = loaded
    plain = greedy_texts(model, tokenizer, PROMPTS, encode=prompt_ids, max_tokens=12)
    stops = {plain[0].answer[4], plain[1].answer[2]}
    monkeypatch.setattr(tokenizer, "_eos_token_ids", stops)
    for before, after in zip(
        plain,
        greedy_texts(model, tokenizer, PROMPTS, encode=prompt_ids, max_tokens=12),
        strict=True,
    ):
        ends = [at for at, token in enumerate(before.answer) if token in stops]
        assert after.answer == before.answer[: ends[0] + 1 if ends else None]


def test_texts_are_kept(loaded: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, tokenizer = loaded
    file = tmp_path / "texts.jsonl"
    first = greedy_texts(model, tokenizer, PROMPTS[:3], encode=prompt_ids, max_tokens=6, path=file)
    asked: list[int] = []
    generate = room.generate_batch

    def counting(model: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(room, "generate_batch", counting)
    every = greedy_texts(model, tokenizer, PROMPTS, encode=prompt_ids, max_tokens=6, path=file)
    assert every[:3] == first and asked == [2]
    assert (
        greedy_texts(model, tokenizer, PROMPTS, encode=prompt_ids, max_tokens=6, path=file) == every
    )
    assert asked == [2] and texts_hash(every) != texts_hash(first)


def test_texts_of_others_are_refused(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    file = tmp_path / "texts.jsonl"
    greedy_texts(model, tokenizer, PROMPTS[:1], encode=prompt_ids, max_tokens=6, path=file)
    with pytest.raises(ValueError, match="was made with max_tokens 6, not 7"):
        greedy_texts(model, tokenizer, PROMPTS[:1], encode=prompt_ids, max_tokens=7, path=file)
    file.write_text('{"torn')
    with pytest.raises(ValueError, match="is damaged"):
        greedy_texts(model, tokenizer, PROMPTS[:1], encode=prompt_ids, max_tokens=6, path=file)


def test_kinds_of_the_built_in_prompts_have_a_sum_without_languages() -> None:
    def answer(sequence: int) -> Any:
        return tokens_per_step.Answer(1, 2, 3, None, sequence)  # type: ignore[arg-type]

    texts = [GreedyText(kind, kind, [1], [2]) for kind in tokens_per_step.KINDS]
    answers = [answer(at) for at in range(len(texts))]
    found = tokens_per_step.by_kind(texts, answers)
    assert set(found) == {*tokens_per_step.KINDS, "english", "all"}
    assert len(found["english"]) == len(texts) - 1 and found["all"] == answers
    assert set(tokens_per_step.by_kind(texts[:1], answers[:1])) == {texts[0].kind}


def test_the_table_and_its_json_line(
    pair: tuple[Path, Path], prompt_file: Path, tmp_path: Path
) -> None:
    model, adapter = map(str, pair)
    arguments = ["--model", model, "--adapter-path", adapter, "--adapter-path", f"{adapter}/"]
    arguments += ["--prompts", str(prompt_file), "--max-tokens", "10", "--num-draft-tokens", "2"]
    arguments += ["--texts", str(tmp_path / "kept.jsonl")]
    done = CliRunner().invoke(tokens_per_step.main, arguments)
    assert done.exit_code == 0, done.output
    *shown, last = done.stdout.strip().splitlines()
    line = json.loads(last)
    assert shown[0].startswith("tokens per step") and any("even" in each for each in shown)
    one, two = line["results"].values()
    assert one == two and set(one) == {"odd", "even", "all"}
    assert one["all"]["num_sequences"] == 5 and len(one["all"]["acceptance"]) == 2
    again = CliRunner().invoke(tokens_per_step.main, [*arguments, "--json"])
    assert json.loads(again.stdout)["results"] == line["results"]


def test_bad_input_is_one_line(pair: tuple[Path, Path], prompt_file: Path) -> None:
    model, adapter = map(str, pair)
    arguments = ["--model", model, "--adapter-path", adapter, "--prompts", str(prompt_file)]
    done = CliRunner().invoke(tokens_per_step.main, [*arguments, "--num-draft-tokens", "9"])
    assert done.exit_code == 2
    assert done.stderr.strip().splitlines()[-1].startswith("Error: num_draft_tokens must be")
    for command in (tokens_per_step.main, reproduction.main):
        done = CliRunner().invoke(command, ["--model", model, "--prompts", str(prompt_file)])
        assert done.exit_code == 2 and "has no adapter" in done.stderr


DATA = [f"{word} {number} " * 6 for number in range(8) for word in ("one", "two", "three")]
SMALL = [
    "--workers",
    "1",
    "--iters",
    "3",
    "--batch-size",
    "2",
    "--num-anchors",
    "4",
    "--num-draft-tokens",
    "2",
]
SMALL += ["--steps-per-eval", "2", "--warmup", "1", "--rank", "2", "--ranks", "1,2,4"]


@pytest.fixture(scope="module")
def runs(pair: tuple[Path, Path], tmp_path_factory: Any) -> tuple[list[str], Path, dict[str, Any]]:
    """All variants, trained for three steps on a few words."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DATA))
    arguments = ["--model", str(pair[0]), "--data", str(data), "--output", str(folder / "out")]
    done = CliRunner().invoke(ablations.main, [*arguments, *SMALL], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [*arguments, *SMALL], folder / "out", json.loads(done.stdout.splitlines()[-1])


def test_every_variant_is_trained_alike(runs: Any) -> None:
    _, folder, line = runs
    wanted = {"rank-1", "rank-2", "rank-4", "no-lcm", "no-sampler", "no-gate"}
    assert set(line["runs"]) == wanted and line["finished"]
    assert all(each["step"] == 3 for each in line["runs"].values())
    found = {
        name: json.loads((folder / name / "training" / "settings.json").read_text())
        for name in wanted
    }
    assert len({each["data_hash"] for each in found.values()}) == 1
    assert found["rank-4"]["rank"] == 4 and found["no-lcm"]["lcm_weight"] == 0
    assert not found["no-gate"]["gate"] and not found["no-sampler"]["sampler"]


def test_finished_runs_are_passed_over(runs: Any) -> None:
    arguments, folder, line = runs
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = CliRunner().invoke(ablations.main, [*arguments, "--only", "rank-1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runs"] == {"rank-1": line["runs"]["rank-1"]}
    assert before == {path: path.stat().st_mtime_ns for path in before}
    done = CliRunner().invoke(ablations.main, [*arguments, "--only", "rank-9"])
    assert done.exit_code == 2 and "no run is named rank-9" in done.stderr


def test_a_stopped_variant_goes_on(runs: Any, tmp_path: Path) -> None:
    arguments, folder, line = runs
    moved = [str(tmp_path) if each == str(folder) else each for each in arguments]
    context = ablations.main.make_context("ablations", [*moved, "--only", "rank-2"])
    asked = iter([False, True, True, True])
    stopped = ablations.ablate(context.params, should_stop=lambda: next(asked))
    assert not stopped["finished"]
    again = ablations.ablate(context.params)
    assert again["finished"] and again["runs"]["rank-2"] == line["runs"]["rank-2"]


@pytest.mark.slow
def test_figures_of_runs(
    runs: Any, pair: tuple[Path, Path], prompt_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    _, folder, line = runs
    arguments = ["--model", str(pair[0]), "--adapter-path", str(pair[1])]
    arguments += ["--prompts", str(prompt_file), "--max-tokens", "8", "--output", str(tmp_path)]
    arguments += line["figures"].split()
    done = CliRunner().invoke(reproduction.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "figures.json").read_text())
    names = {f"{name}.{kind}" for name in ("masks", "losses", "ranks", "gate") for kind in FORMATS}
    assert set(summary["files"]) == names
    assert names | {"figures.json"} == {path.name for path in tmp_path.iterdir()} - {
        prompt_file.name
    }
    assert len(summary["masks"]) == 4
    for points in summary["masks"].values():
        assert set(points["tokens_per_step"]) == set(points["half_width"]) == {"1", "2", "3", "4"}
    assert summary["runs"]["no-gate"]["tokens_per_step"] == {}  # it cannot decode
    whole = summary["runs"]["rank-2"]
    assert set(whole["tokens_per_step"]) == {"1", "2"}
    (history,) = whole["evaluations"]
    assert [each["step"] for each in history] == [0, 2, 3]
    losses = [each["next_token_loss"] for each in history]
    assert losses[0] == losses[-1]  # with the gate nothing changes
    (history,) = summary["runs"]["no-gate"]["evaluations"]
    rising = [each["next_token_loss"] for each in history]
    assert rising[0] != rising[-1]


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = {"linear": [(1, 1.5), (2, 2.0)], "quadratic": [(1, 1.6), (2, 2.5)]}
    for folder in ("a", "b"):
        draw_lines(lines, tmp_path / folder / "x", x="masks", y="speed", log_x=True)
    for ending in FORMATS:
        one, two = ((tmp_path / folder / f"x.{ending}").read_bytes() for folder in ("a", "b"))
        assert one == two and len(one) > 1000


@pytest.mark.parametrize(
    ("run", "told"),
    [("no-folder", "--run takes NAME=FOLDER"), ("a=nowhere", "has no training run")],
)
def test_a_run_that_is_none(pair: tuple[Path, Path], run: str, told: str) -> None:
    done = CliRunner().invoke(reproduction.main, ["--model", str(pair[0]), "--run", run])
    assert done.exit_code == 2 and told in done.stderr


@pytest.fixture
def two_seeds(runs: Any, tmp_path: Path) -> list[str]:
    """Options of a run and its copy, as if that had had another seed."""
    _, folder, _ = runs
    shutil.copytree(folder / "rank-2", tmp_path / "copy")
    file = tmp_path / "copy" / "training" / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 1}))
    return [f"--run=a={folder / 'rank-2'}", f"--run=a={tmp_path / 'copy'}"]


@pytest.mark.slow
def test_runs_of_one_name_are_seeds(
    two_seeds: list[str], pair: tuple[Path, Path], prompt_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--model", str(pair[0]), "--adapter-path", str(pair[1])]
    arguments += ["--prompts", str(prompt_file), "--max-tokens", "8"]
    found = []
    for number, options in enumerate((two_seeds, two_seeds[:1])):
        output = tmp_path / str(number)
        done = CliRunner().invoke(
            reproduction.main,
            [*arguments, *options, "--output", str(output)],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
        found.append(json.loads((output / "figures.json").read_text())["runs"]["a"])
    two, one = found
    assert two["seeds"] == 2 and len(two["evaluations"]) == 2 and one["seeds"] == 1
    assert two["tokens_per_step"] == one["tokens_per_step"]  # the adapters are the same
    assert two["half_width"] == one["half_width"]


def test_runs_of_one_name_differ_in_their_seed_only(
    two_seeds: list[str], runs: Any, pair: tuple[Path, Path]
) -> None:
    other = f"--run=a={runs[1] / 'rank-4'}"
    for options, message in (
        ([two_seeds[0]] * 2, "two runs named a have the same seed"),
        ([two_seeds[0], other], "differs from"),
    ):
        done = CliRunner().invoke(reproduction.main, ["--model", str(pair[0]), *options])
        assert done.exit_code == 2 and message in done.stderr
