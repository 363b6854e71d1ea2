"""The training benchmark: PyTorch's step is ours, another one is found out, the command runs."""

from __future__ import annotations

import dataclasses
import json
import sys

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_mtp.lab import train_step
from mlx_mtp.lab.step_agreement import Agreement, compare
from mlx_mtp.lab.train_step import (
    OurStep,
    Timings,
    measure,
    sample_sequences,
    torch_step,
)
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, save_tiny_model, tiny_base

torch = pytest.importorskip("torch")

SETTINGS = TrainSettings(
    num_draft_tokens=3, rank=4, batch_size=2, num_anchors=6, rows_per_forward=8, iters=10, warmup=0
)


def pair(kind: str = "llama", settings: TrainSettings = SETTINGS, **overrides):
    """A tiny model with a fresh adapter, its rival and two sequences."""
    base = tiny_base(kind, vocab_size=BYTE_VOCAB, **overrides)
    model = new_adapter(MTPModel(base, name="tiny"), settings)
    rival = torch_step(model, settings, num_threads=1)
    return model, rival, sample_sequences(byte_tokenizer(), count=2, length=40)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_rows", [None, 8])
def test_the_sides_agree_in_losses_and_gradients(tied, max_rows):
    model, rival, data = pair(tie_word_embeddings=tied)
    found = compare(model, rival, SETTINGS, data, max_rows=max_rows)
    assert set(found.losses) == {"all", "base", "sampler", "lcm"}
    assert set(found.norms) == {"all", "lora_a", "lora_b", "mask_embeddings", "sampler_head"}
    assert max(found.losses.values()) < 1e-5
    assert max(found.norms.values()) < 1e-4
    assert found.gradient < 1e-4


def test_they_agree_without_a_sampler_and_with_blocks_of_several_lengths():
    settings = dataclasses.replace(SETTINGS, sampler=False, drop_late=0.4, lcm_weight=0.3)
    model, rival, data = pair(settings=settings)
    found = compare(model, rival, settings, data)
    assert set(found.losses) == {"all", "base", "lcm"}
    assert max(found.losses.values()) < 1e-5
    assert found.gradient < 1e-4


def test_candidates_do_not_spoil_the_comparison():
    settings = dataclasses.replace(SETTINGS, candidates=16)
    model, rival, data = pair(settings=settings)
    compare(model, rival, settings, data).check()


def test_comparing_leaves_the_parameters_as_they_were():
    model, rival, data = pair()
    before = trainable(model)
    compare(model, rival, SETTINGS, data)
    after = trainable(model)
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    for name, value in rival.parameters.items():
        assert mx.array_equal(mx.array(value.detach().numpy()), before[name]).item()


def test_another_step_is_found_out():
    model, rival, data = pair()
    rival._frozen["model.norm.weight"] *= 1.05
    with pytest.raises(ValueError, match="PyTorch's step is not ours: loss"):
        compare(model, rival, SETTINGS, data).check()


def test_a_number_that_is_none_is_found_out():
    with pytest.raises(ValueError, match="gradient norm all"):
        Agreement(losses={"all": 0.0}, norms={"all": float("nan")}, gradient=0.0).check()


def test_pytorch_learns_what_ours_learns():
    """Many steps on the same blocks: the optimisers differ in a factor alone, both losses fall."""
    model, rival, data = pair()
    ours = OurStep(model, SETTINGS)
    first = rival.gradient(data, range(2), step=0)
    for _ in range(8):
        ours(data, range(2), step=0)
        rival(data, range(2), step=0)
    last = rival.gradient(data, range(2), step=0)
    assert sum(last.values()) < sum(first.values())
    rival.load(trainable(model))
    last = rival.gradient(data, range(2), step=0)
    assert sum(last.values()) < sum(first.values())


def test_steps_are_timed_in_turns_and_in_alternating_order(monkeypatch):
    model, rival, data = pair()
    calls: list[str] = []
    monkeypatch.setattr(OurStep, "__call__", lambda *a, **k: calls.append("ours"))
    monkeypatch.setattr(type(rival), "__call__", lambda *a, **k: calls.append("torch"))
    timings = measure(OurStep(model, SETTINGS), rival, data, SETTINGS, repeats=3)
    assert calls[-6:] == ["ours", "torch", "torch", "ours", "ours", "torch"]
    assert set(timings.tried) == {"8", "a sequence"}
    assert [len(each) for each in timings.seconds.values()] == [3, 3]
    assert timings.tokens == [80] * 3


def test_ratios_are_those_of_pairs():
    timings = Timings(
        {"ours": [1.0, 2.0, 4.0], "torch": [2.0, 6.0, 4.0]}, [80] * 3, [40] * 3, None, {}
    )
    found = timings.summary()
    assert (found["ratio"], found["ratio_spread"]) == (2.0, [1.0, 3.0])
    assert found["ours"] == {"seconds": 2.0, "tokens_per_s": 40.0, "rows_per_s": 20.0}


@pytest.mark.parametrize(
    ("kind", "overrides", "what"),
    [
        ("qwen3", {}, "not for qwen3"),
        ("llama", {"attention_bias": True}, "has attention_bias"),
        ("llama", {"rope_traditional": True}, "has rope_traditional"),
    ],
)
def test_other_models_are_refused(kind, overrides, what):
    with pytest.raises(ValueError, match=what):
        pair(kind, **overrides)


def test_a_missing_pytorch_names_the_extra(monkeypatch):
    model, _, _ = pair()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install \"mlx-mtp\[convert\]\""):
        torch_step(model, SETTINGS, num_threads=1)


def run(folder, *more: str):
    arguments = ["--model", str(folder), "--batch-size", "2", "--length", "40", "--repeats", "2"]
    arguments += ["--num-anchors", "4", "--num-draft-tokens", "2", "--rank", "2", *more]
    return CliRunner().invoke(train_step.main, arguments)


@pytest.mark.slow
def test_the_command_ends_in_one_json_line(tmp_path):
    done = run(save_tiny_model(tmp_path / "model"), "--workers", "1")
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert lines[-2].startswith("ratio ours/torch")
    line = json.loads(lines[-1])
    assert line["ratio_spread"][0] <= line["ratio"] <= line["ratio_spread"][1]
    assert line["agreement"]["losses"]["all"] < 1e-3
    assert line["processes"] == 1
    assert set(line["versions"]) >= {"mlx", "torch"}


@pytest.mark.slow
def test_the_command_uses_workers_and_candidates(tmp_path):
    done = run(save_tiny_model(tmp_path / "m"), "--workers", "2", "--candidates", "8", "--json")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert (line["processes"], line["candidates"]) == (2, 8)


def test_bad_options_are_one_line(tmp_path):
    done = run(save_tiny_model(tmp_path / "qwen", "qwen3"))
    assert done.exit_code == 2
    assert done.stderr == "Error: the PyTorch step is written for llama, not for qwen3\n"
