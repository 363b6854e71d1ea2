"""The benchmark's arithmetic, and one run of its command on a tiny model."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_mtp.bench import throughput
from mlx_mtp.bench.throughput import Answer


def answer(tokens: int, steps: int, seconds: float) -> Answer:
    return Answer(list(range(tokens)), steps, 1, seconds)


def test_the_clock_leaves_the_first_step_out(monkeypatch):
    times = iter([100.0, 101.0, 103.0, 106.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(times))
    done = throughput.timed(iter([[1, 2], [3], [4, 5, 6]]))
    assert (done.ids, done.steps, done.first, done.seconds) == ([1, 2, 3, 4, 5, 6], 3, 2, 5.0)
    assert done.tps == 4 / 5.0


def test_speedups_are_ratios_to_the_first_mode():
    answers = {
        "chat": {
            "plain": [answer(11, 11, 10.0), answer(21, 21, 20.0)],
            "auto": [answer(11, 6, 5.0), answer(21, 10, 10.0)],
        }
    }
    table = throughput._table(answers, ["plain", "auto"])
    assert table["chat"] == table["all"]
    assert table["all"]["plain"]["tps"] == 1.0
    assert table["all"]["auto"]["speedup"] == 2.0
    assert table["all"]["auto"]["median_speedup"] == 2.0
    assert table["all"]["auto"]["tokens_per_step"] == 2.0


def test_human_eval_has_164_problems():
    prompts = throughput.human_eval_prompts()
    assert len(prompts) == 164
    assert len({prompt.text for prompt in prompts}) == 164


@pytest.mark.slow
def test_the_command_ends_in_one_json_line():
    arguments = ["--every", "60", "--max-tokens", "6", "--overhead-of", "1"]
    arguments += ["--modes", "plain,auto,quadratic"]
    done = CliRunner().invoke(throughput.main, arguments)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["different_answers"] == 0
    assert set(line["results"]["all"]) == {"plain", "auto", "quadratic"}
    assert line["overhead"] < 1  # noise may make it negative
