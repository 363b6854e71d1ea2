"""The suite of experiments behind the defaults: paired differences, and tiny runs of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mtp.lab import ablations
from mlx_mtp.lab.paired import TextSteps, difference, interval, table
from mlx_mtp.train.gradient.step import max_masks
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.tiny import save_tiny_pair

DATA = [f"{word} {number} " * 6 for number in range(8) for word in ("one", "two", "three")]
SMALL = ("--workers 1 --iters 2 --batch-size 2 --num-anchors 4 --num-draft-tokens 2 --warmup 1 "
         "--rank 2 --steps-per-eval 2 --val-batches 2 --held-out 0.3 --suite recipe")  # fmt: skip


def random_steps(rng: np.random.Generator, tokens: np.ndarray, gain: float) -> TextSteps:
    """Steps of texts that a drafter with about ``gain`` tokens per step would take."""
    return TextSteps(tokens, np.ceil(tokens / (gain * rng.uniform(0.7, 1.4, len(tokens)))))


def test_the_error_is_that_of_drawing_the_texts_again():
    rng = np.random.default_rng(3)
    tokens = rng.integers(20, 65, 300).astype(float)
    ours = [random_steps(rng, tokens, 2.2) for _ in range(2)]
    control = [random_steps(rng, tokens, 2.0) for _ in range(2)]
    found = difference(ours, control)
    assert found.mean == pytest.approx(np.mean(found.by_seed)) and len(found.by_seed) == 2
    draws = []
    for _ in range(2000):
        chosen = rng.integers(0, 300, 300)
        again = [
            [TextSteps(run.tokens[chosen], run.steps[chosen]) for run in runs]
            for runs in (ours, control)
        ]
        draws.append(difference(*again).mean)
    assert found.error == pytest.approx(np.std(draws), rel=0.1)


def test_the_interval_of_seeds_is_that_of_drawing_the_texts_again():
    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 65, 300).astype(float)
    seeds = [random_steps(rng, tokens, gain) for gain in (2.0, 2.3)]
    mean, half = interval(seeds)
    assert mean == pytest.approx(np.mean([steps.tokens_per_step for steps in seeds]))
    draws = []
    for _ in range(2000):
        chosen = rng.integers(0, 300, 300)
        draws.append(interval([TextSteps(s.tokens[chosen], s.steps[chosen]) for s in seeds])[0])
    assert half == pytest.approx(1.97 * np.std(draws), rel=0.1)
    assert interval([TextSteps(tokens, tokens / 2)]) == (2, 0)
    with pytest.raises(ValueError, match="no runs"):
        interval([])


def test_the_same_run_differs_by_nothing():
    run = random_steps(np.random.default_rng(1), np.full(9, 30.0), 2.0)
    assert difference([run], [run]) == difference([run], [run])
    assert (difference([run], [run]).mean, difference([run], [run]).error) == (0, 0)
    other = TextSteps(run.tokens + 1, run.steps)
    with pytest.raises(ValueError, match="different texts"):
        difference([run], [other])
    lines = table({"control": [run], "other": [run]}, control="control").splitlines()
    assert lines[2].startswith("| **control** | ") and lines[3].endswith(
        "| +0.000 ± 0.000 | +0.000 |"
    )


def test_every_variant_changes_something_and_keeps_the_rows():
    shared = TrainSettings(iters=100, num_anchors=32, batch_size=4)
    runs = ablations.recipe_variants(shared)
    assert runs[ablations.CONTROL] == shared
    assert all(settings != shared for name, settings in runs.items() if name != "control")
    assert len(set(map(str, runs.values()))) == len(runs)
    rows = {settings.num_anchors * settings.batch_size for settings in runs.values()}
    assert rows == {128} and {settings.iters for settings in runs.values()} == {100}


def test_masks_grow_during_the_ramp():
    settings = TrainSettings(num_draft_tokens=8, draft_ramp=70)
    counts = [max_masks(settings, step=step) for step in range(100)]
    assert counts == sorted(counts) and set(counts) == set(range(1, 9))
    assert counts[0] == 1 and counts[69] in (7, 8)
    assert set(counts[70:]) == {8}
    assert max_masks(dataclasses.replace(settings, draft_ramp=0), step=0) == 8


@pytest.mark.slow
def test_tiny_runs_are_compared_and_resumed(tmp_path: Path) -> None:
    model, _ = save_tiny_pair(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DATA))
    words = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    words += [*SMALL.split(), "--seeds", "0,1", "--only", "reach-weights", "--only", "draft-ramp"]
    done = CliRunner().invoke(ablations.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    names = {f"{name}-seed-{seed}" for name in ("control", "reach-weights", "draft-ramp")
             for seed in (0, 1)}  # fmt: skip
    assert set(line["runs"]) == names and line["finished"]
    assert set(line["differences"]) == {"reach-weights", "draft-ramp"}
    assert line["num_texts"] >= 2 and len(line["differences"]["draft-ramp"]["by_seed"]) == 2
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.count("\n") == 5 and "| **control** |" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("state*")}
    again = CliRunner().invoke(ablations.main, words, catch_exceptions=False)
    assert json.loads(again.stdout.splitlines()[-1]) == line
    assert before == {path: path.stat().st_mtime_ns for path in before}
    refused = CliRunner().invoke(ablations.main, [*words, "--val-batches", "50"])
    assert refused.exit_code == 2 and "lower --val-batches" in refused.stderr
