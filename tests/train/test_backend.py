"""Which back-end a run takes, that it says so, resumes with it, and shares it with its workers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.pytorch import model as pytorch
from mlx_mtp.loading import load
from mlx_mtp.train.gradient import backend
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.backend import make_gradient
from mlx_mtp.train.gradient.workers import Workers, WorkerSpec
from mlx_mtp.train.run.checkpoint import read_state
from mlx_mtp.train.run.events import Noticed
from tests.helpers.fixtures_generate import EOS
from tests.helpers.tiny import BYTE_VOCAB, save_tiny_model
from tests.train.test_loop import change, model_for, run, texts

pytest.importorskip("torch")

from mlx_mtp.train.gradient.torch_gradient import TorchGradient  # noqa: E402


@pytest.fixture
def is_worth_it(monkeypatch):
    """Small models and this CPU count as those for which PyTorch is faster."""
    monkeypatch.setattr(backend, "_SMALLEST", 1)
    monkeypatch.setattr(pytorch, "has_bfloat16", lambda device: True)


def chosen(kind: str = "llama", **values) -> tuple[bool, str, str | None]:
    """Whether PyTorch computes, the setting that a run keeps, and the line."""
    settings = change(**values)
    gradient, settings, line = make_gradient(model_for(settings, kind), settings)
    return isinstance(gradient, TorchGradient), settings.backend, line


def test_small_models_stay_with_mlx():
    assert chosen() == (False, "mlx", None)


def test_auto_takes_pytorch_and_says_so(is_worth_it):
    is_torch, name, line = chosen()
    assert (is_torch, name) == (True, "torch")
    assert line is not None and line.startswith("Gradients are computed by PyTorch in bfloat16 on ")


def test_auto_says_why_it_does_not_take_pytorch(is_worth_it):
    is_torch, name, line = chosen("qwen3_moe")
    assert (is_torch, name) == (False, "mlx")
    assert line is not None and line.endswith("(qwen3_moe): it has experts")


@pytest.mark.parametrize("values", [{"backend": "mlx"}, {"gate": False}, {"drafter": "heads"}])
def test_auto_takes_mlx_without_a_word_where_nothing_else_is_possible(is_worth_it, values):
    assert chosen(**values) == (False, "mlx", None)


def test_what_was_asked_for_is_not_replaced():
    with pytest.raises(ValueError, match="it has experts"):
        chosen("qwen3_moe", backend="torch")


@pytest.mark.slow
def test_a_run_resumes_with_its_backend_and_the_same_bits(tmp_path):
    whole = change(backend="torch")
    _, events = run(tmp_path / "whole", whole)
    lines = [event.text for event in events if isinstance(event, Noticed)]
    assert len(lines) == 1 and lines[0].startswith("Gradients are computed by PyTorch")
    stops = iter([False, False, True])
    run(tmp_path / "parts", whole, should_stop=lambda: next(stops, True))
    for other in ("auto", "mlx"):
        with pytest.raises(ValueError, match="different backend"):
            run(tmp_path / "parts", change(backend=other), resume=True)
    run(tmp_path / "parts", whole, resume=True)
    states = [
        read_state(tmp_path / name / "training" / "state-0000004").tensors
        for name in ("whole", "parts")
    ]
    assert all(mx.array_equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_processes_give_the_gradient_of_one(tmp_path):
    folder = str(save_tiny_model(tmp_path / "model"))
    settings = dataclasses.replace(change(backend="torch"), batch_size=3)
    model = new_adapter(load(folder, mtp=False)[0], settings)
    parameters, data = trainable(model), texts(3)
    gradient = TorchGradient(model, settings, num_threads=1)
    alone = gradient(parameters, data, [0, 1, 2], step=3)
    spec = WorkerSpec(model=folder, settings=settings)
    with Workers(spec, data, count=2, like=parameters) as workers:
        shared = gradient(parameters, data, [0, 1, 2], step=3, workers=workers)
    assert shared.loss == pytest.approx(alone.loss, rel=1e-5)
    for name, value in alone.gradients.items():
        np.testing.assert_allclose(shared.gradients[name], value, atol=1e-5, err_msg=name)


def test_the_command_finds_pytorch(tmp_path):
    model = save_tiny_model(tmp_path / "model", "llama", vocab_size=BYTE_VOCAB, eos_token_id=EOS)
    data = tmp_path / "data.jsonl"
    numbers = [" ".join(str((n + 7) ** i % 9973) for i in range(1, 30)) for n in range(8)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in numbers))
    options = "--data-as-is --backend torch --iters 1 --batch-size 2 --num-anchors 4 --workers 1"
    command = [sys.executable, "-m", "mlx_mtp", "train", "--model", str(model)]
    command += ["--data", str(data), "--adapter-path", str(tmp_path / "out"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Gradients are computed by PyTorch" in done.stdout + done.stderr
