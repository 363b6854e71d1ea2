"""The training benchmark: other gradients are found out, pairs are timed in turns, it runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_mtp.lab import train_step
from mlx_mtp.lab.train_step import Timings, differences, measure, perturbed, sample_sequences
from mlx_mtp.train.gradient.step import StepResult
from mlx_mtp.train.settings import MLX, TORCH
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import save_tiny_model

pytest.importorskip("torch")

RESULT = StepResult({"a": mx.array([3.0, 4.0])}, loss=2.0, terms={}, num_tokens=9, num_rows=5)


def test_differences_are_relative():
    other = dataclasses.replace(RESULT, loss=2.02, gradients={"a": mx.array([3.0, 4.5])})
    assert differences(RESULT, RESULT) == {"loss": 0.0, "gradient": 0.0}
    assert differences(RESULT, other) == pytest.approx({"loss": 0.01, "gradient": 0.1})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"loss": 2.2}, "the loss of PyTorch differs by 0.1"),
        ({"loss": float("nan")}, "the loss of PyTorch differs by nan"),
        ({"gradients": {"a": mx.array([4.0, 3.0])}}, "the gradient of PyTorch differs by 0.28"),
    ],
)
def test_another_step_is_found_out(changes, what, monkeypatch):
    monkeypatch.setattr(train_step, "MAX_GRADIENT_ERROR", 0.2)
    with pytest.raises(ValueError, match=what):
        differences(RESULT, dataclasses.replace(RESULT, **changes))


def test_steps_are_timed_in_turns_and_in_alternating_order():
    calls: list[tuple[str, int]] = []

    def side(name: str) -> Any:
        return lambda *args, step: calls.append((name, step)) or RESULT

    timings = measure({MLX: side(MLX), TORCH: side(TORCH)}, {}, [], repeats=3)
    assert calls == [(MLX, 1), (TORCH, 1), (TORCH, 2), (MLX, 2), (MLX, 3), (TORCH, 3)]
    assert timings.rows == [5] * 3
    assert [len(x) for x in (*timings.seconds.values(), *timings.cpu_seconds.values())] == [3] * 4


def test_ratios_are_those_of_pairs():
    seconds = {MLX: [2.0, 6.0, 4.0], TORCH: [1.0, 2.0, 4.0]}
    cpu_seconds = {MLX: [4.0, 4.0, 4.0], TORCH: [1.0, 1.0, 2.0]}
    found = Timings(seconds, cpu_seconds, [40] * 3).summary()
    assert (found["ratio"], found["ratio_spread"]) == (2.0, [1.0, 3.0])
    assert (found["cpu_ratio"], found["cpu_ratio_spread"]) == (4.0, [2.0, 4.0])
    assert found[TORCH] == {"rows_per_s": 20.0, "rows_per_cpu_s": 40.0}


def test_sequences_and_noise():
    data = sample_sequences(byte_tokenizer(), count=2, length=40)
    assert [(len(x.ids), sum(x.answer)) for x in data] == [(40, 30)] * 2
    values = perturbed({"a": mx.zeros((4,))})
    assert mx.all(values["a"] != 0).item()


def run(folder, *more: str):
    arguments = ["--model", str(folder), "--batch-size", "1", "--length", "40", "--repeats", "1"]
    arguments += ["--num-anchors", "4", "--num-draft-tokens", "2", "--rank", "2", *more]
    return CliRunner().invoke(train_step.main, arguments)


@pytest.mark.slow
def test_the_command_ends_in_one_json_line(tmp_path):
    done = run(save_tiny_model(tmp_path / "model", "qwen3"))
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert lines[-2].startswith("CPU time, mlx/torch")
    line = json.loads(lines[-1])
    assert line["cpu_ratio_spread"][0] <= line["cpu_ratio"] <= line["cpu_ratio_spread"][1]
    assert line["agreement"]["gradient"] < 0.3
    assert set(line["versions"]) >= {"mlx", "torch"}


def test_a_model_with_experts_is_refused_in_one_line(tmp_path):
    done = run(save_tiny_model(tmp_path / "model", "qwen3_moe"))
    assert done.exit_code == 2
    assert done.stderr.endswith("(qwen3_moe): it has experts\n") and done.stderr.count("\n") == 1


def test_a_missing_pytorch_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if "torch_gradient" in name or "pytorch" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run(save_tiny_model(tmp_path / "model"))
    assert done.exit_code == 2 and 'pip install "mlx-mtp[torch]"' in done.stderr
