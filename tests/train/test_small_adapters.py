"""Training of small adapters: quantised weights, VeRA, and ranks by layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.loading import read_adapter, read_tensors
from mlx_mtp.model.config import WEIGHTS_FILE, MTPConfig
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train import loop
from mlx_mtp.train.average import mean_adapter
from mlx_mtp.train.gradient.adapter import (
    adapter_tensors,
    new_adapter,
    read_state_adapter,
    trainable,
)
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.loop import TrainData, train
from mlx_mtp.train.plan import make_plan
from mlx_mtp.train.run.events import Event, Reported
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.tiny import tiny_base

SETTINGS = TrainSettings(
    num_draft_tokens=3,
    rank=4,
    iters=4,
    batch_size=2,
    num_anchors=6,
    warmup=1,
    learning_rate=3e-3,
    steps_per_eval=2,
    save_every=2,
    workers=1,
    adapter_group_size=32,
)


def change(**values: Any) -> TrainSettings:
    return dataclasses.replace(SETTINGS, **values)


def texts(count: int, seed: int) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [
        TokenSequence(np.resize(rng.integers(2, 40, 4), 20).tolist(), [False] * 4 + [True] * 16)
        for _ in range(count)
    ]


def model_for(
    settings: TrainSettings, *, start: Path | None = None, kind: str = "llama"
) -> MTPModel:
    return new_adapter(MTPModel(tiny_base(kind)), settings, start=start)


def run(
    output: Path, settings: TrainSettings, model: MTPModel | None = None, **options: Any
) -> Any:
    data = TrainData(texts(4, 1), texts(2, 1), "hash")
    return train(model or model_for(settings), data, settings, output, **options)


def config_of(model: MTPModel) -> MTPConfig:
    assert isinstance(model.adapter_config, MTPConfig)
    return model.adapter_config


def mean_of(folders: list[Path]) -> tuple[MTPConfig, dict[str, mx.array]]:
    config, mean = mean_adapter(folders)
    assert isinstance(config, MTPConfig)
    return config, mean


def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The weights of each gradient, and those of each evaluation."""
    gradients, evaluations = [], []
    gradient, evaluate = StepGradient.__call__, loop.evaluate

    def of_step(self: StepGradient, parameters: Any, *args: Any, **options: Any) -> Any:
        gradients.append(adapter_tensors(parameters))
        return gradient(self, parameters, *args, **options)

    def of_model(model: MTPModel, *args: Any, **options: Any) -> Any:
        evaluations.append({n: mx.array(x) for n, x in adapter_tensors(trainable(model)).items()})
        return evaluate(model, *args, **options)

    monkeypatch.setattr(StepGradient, "__call__", of_step)
    monkeypatch.setattr(loop, "evaluate", of_model)
    return gradients, evaluations


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return set(a) == set(b) and all(
        mx.array_equal(value, b[name].astype(mx.float32)) for name, value in a.items()
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_evaluated_is_what_is_loaded(tmp_path, monkeypatch, bits):
    _, evaluations = recorded(monkeypatch)
    run(tmp_path, change(adapter_bits=bits, ema=0.0))
    config, weights = read_adapter(tmp_path)
    assert (config.bits, config.sampler_bits, config.group_size) == (bits, bits, 32)
    assert any(same(evaluated, weights) for evaluated in evaluations)


def test_averaged_weights_are_evaluated_and_saved_quantised(tmp_path, monkeypatch):
    _, evaluations = recorded(monkeypatch)
    result = run(tmp_path, change(adapter_bits=4, ema=0.9, iters=6))
    _, weights = read_adapter(tmp_path)
    assert len(evaluations) == 7  # one at first, then two at each of three
    assert sum(same(evaluated, weights) for evaluated in evaluations) == 1, result


def test_only_the_last_gradients_are_those_of_quantised_weights(tmp_path, monkeypatch):
    gradients, _ = recorded(monkeypatch)
    settings = change(adapter_bits=4, quantized_share=0.5)
    model = model_for(settings)
    run(tmp_path, settings, model)
    name = "model.layers.0.mlp.down_proj.lora_a"
    numbers = [len(np.unique(np.array(weights[name])[:32, 0])) for weights in gradients]
    assert numbers[:2] == [32, 32] and max(numbers[2:]) <= 16  # values of a group of 32
    state = read_state_adapter(tmp_path / "training" / "state-0000004")[1]
    assert len(np.unique(np.array(state[name])[:32, 0])) == 32  # what is trained is not rounded


def test_without_bits_the_weights_are_trained_as_ever(tmp_path, monkeypatch):
    gradients, _ = recorded(monkeypatch)
    run(tmp_path / "a", SETTINGS)
    run(tmp_path / "b", change(quantized_share=1.0, adapter_bits=0))
    assert all(same(a, b) for a, b in zip(gradients[:4], gradients[4:], strict=True))


@pytest.mark.parametrize("settings", [change(adapter_bits=4), change(adapter_kind="vera", rank=8)])
def test_a_run_that_was_stopped_gives_the_same_file(tmp_path, settings):
    run(tmp_path / "whole", settings)
    left = iter([False, False, True])
    run(tmp_path / "parts", settings, should_stop=lambda: next(left))
    run(tmp_path / "parts", settings, resume=True)
    files = [(tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_vera_learns_vectors_and_stores_nothing_else(tmp_path):
    settings = change(adapter_kind="vera", rank=64, iters=60, learning_rate=5e-2, steps_per_eval=60)
    settings = dataclasses.replace(settings, sampler=False, sampler_weight=0.0, teacher="sample")
    events: list[Event] = []
    run(tmp_path, settings, on_event=events.append)
    losses = [event.terms["base"] for event in events if isinstance(event, Reported)]
    assert losses[-1] < 0.9 * losses[0]
    tensors, (config, weights) = read_tensors(tmp_path / WEIGHTS_FILE), read_adapter(tmp_path)
    vectors = {name: value for name, value in tensors.items() if name != "mask_embeddings"}
    assert all(value.ndim == 1 for value in vectors.values())
    assert config.adapter_kind == "vera" and len(vectors) == 2 * 2 * 7
    assert weights["model.layers.0.mlp.down_proj.lora_a"].shape == (64, 64)
    loaded = MTPModel(tiny_base("llama"), config=config, weights=weights)
    assert config_of(loaded) == config


def test_a_new_adapter_of_vectors_changes_nothing(tmp_path):
    model = model_for(change(adapter_kind="vera"))
    layer = model.base.model.layers[0].mlp.down_proj
    assert not layer.lora_b.any() and layer.lora_a.any()


def test_vera_is_continued_as_vera_or_as_trained_matrices(tmp_path):
    vera = change(adapter_kind="vera", rank=8)
    run(tmp_path / "vera", vera)
    again = model_for(vera, start=tmp_path / "vera")
    assert config_of(again).adapter_kind == "vera"
    expected = read_adapter(tmp_path / "vera")[1]
    assert same(adapter_tensors(trainable(again)), expected)
    plain = model_for(change(rank=8, adapter_bits=4), start=tmp_path / "vera")
    assert config_of(plain).adapter_kind == "lora" and config_of(plain).bits == 4
    run(tmp_path / "lora", change(rank=8))
    with pytest.raises(ValueError, match="is not of kind vera, so it cannot be continued as such"):
        model_for(vera, start=tmp_path / "lora")


def test_a_quantised_adapter_is_continued_and_averaged(tmp_path):
    run(tmp_path / "one", change(adapter_bits=4))
    model = model_for(SETTINGS, start=tmp_path / "one")
    assert config_of(model).bits == 0
    weights = read_adapter(tmp_path / "one")[1]
    assert same(adapter_tensors(trainable(model)), weights)
    run(tmp_path / "two", SETTINGS, model)
    config, mean = mean_of([tmp_path / "one", tmp_path / "two"])
    assert config.bits == 0 and config == config.as_plain()
    other = read_adapter(tmp_path / "two")[1]
    for name, value in mean.items():
        both = weights[name].astype(mx.float32) + other[name].astype(mx.float32)
        assert mx.allclose(value, both / 2, atol=1e-6)


def test_states_of_vera_are_averaged_as_low_rank_weights(tmp_path):
    run(tmp_path, change(adapter_kind="vera", rank=8))
    states = [tmp_path / "training" / f"state-000000{step}" for step in (2, 4)]
    config, mean = mean_of(states)
    assert config.adapter_kind == "lora"
    assert mean["model.layers.0.mlp.down_proj.lora_a"].shape == (64, 8)


def test_ranks_by_layer(tmp_path):
    settings = change(rank_by_layer="0=2, down_proj=6,1-1=8, q_proj=4")
    model = model_for(settings)
    shapes = {n: x.shape[-1] for n, x in trainable(model).items() if n.endswith("lora_a")}
    ranks = {name.removeprefix("base.").removesuffix(".lora_a"): r for name, r in shapes.items()}
    layers = "model.layers.{}.{}".format
    assert ranks[layers(0, "mlp.up_proj")] == 2 and ranks[layers(0, "mlp.down_proj")] == 6
    assert ranks[layers(1, "mlp.down_proj")] == 8 and ranks[layers(0, "self_attn.q_proj")] == 4
    pattern = config_of(model).rank_pattern
    assert layers(1, "self_attn.q_proj") not in pattern  # it has the rank of the others
    run(tmp_path, settings, model)
    config, weights = read_adapter(tmp_path)
    assert config.rank_pattern == pattern
    MTPModel(tiny_base("llama"), config=config, weights=weights)
    with pytest.raises(
        ValueError, match="rank_by_layer cannot be used with .*, which has its ranks"
    ):
        model_for(settings, start=tmp_path)


def test_an_adapter_is_continued_as_it_is_stored_unless_options_say_otherwise(tmp_path):
    run(tmp_path / "one", change(adapter_bits=4, sampler_bits=8))
    command = {"resume_adapter_file": str(tmp_path / "one"), "adapter_path": str(tmp_path / "two")}

    def storage(**options: Any) -> tuple[int, int, int]:
        settings = make_plan(command | options, RunFolder(tmp_path / "two")).settings
        return settings.adapter_bits, settings.bits_of_sampler, settings.adapter_group_size

    assert storage() == (4, 8, 32)
    assert storage(adapter_bits=3) == (3, 3, 64)
    assert storage(adapter_bits=0) == (0, 0, 64)


@pytest.mark.parametrize(
    "text", ["q_proj", "q_proj=0", "=4", "3-=4", "5-2=4", "0-x=4", "q_proj=4.5"]
)
def test_ranks_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="rank_by_layer"):
        change(rank_by_layer=text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_bits": 7}, "adapter_bits must be one of 0, 2, 3, 4, 5, 6, 8, got 7"),
        ({"sampler_bits": 1}, "sampler_bits must be one of"),
        ({"adapter_group_size": 48}, "adapter_group_size must be one of 32, 64, 128, got 48"),
        ({"drafter": "heads", "adapter_bits": 4}, "heads are not quantised"),
        ({"drafter": "heads", "adapter_kind": "vera"}, "are for mask tokens, not for heads"),
        ({"adapter_kind": "vera", "adapter_bits": 4}, "adapter_bits cannot be used with vera"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        change(**values)
