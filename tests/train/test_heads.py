"""Training of independent heads: they learn, the model stays, and folders and runs are whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.loading import load, read_adapter, read_any_adapter
from mlx_mtp.model.config import CONFIG_FILE, HEAD_KINDS, WEIGHTS_FILE
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.average import save_mean
from mlx_mtp.train.gradient.adapter import adapter_tensors, new_adapter, trainable
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.loop import TrainData
from mlx_mtp.train.run.checkpoint import newest_state, save_state
from mlx_mtp.train.run.events import Evaluated, Reported
from mlx_mtp.train.run.memory import estimate
from mlx_mtp.train.settings import ROW_WEIGHTS, TrainSettings
from tests.helpers.tiny import save_tiny_model, save_tiny_pair, tiny_base
from tests.train import test_loop
from tests.train.test_loop import SETTINGS, flat, model_for, run, texts

HEADS = dataclasses.replace(SETTINGS, drafter="heads")
CLOSE = test_loop.TestGradients().close


def of_kind(head: str, **values: Any) -> TrainSettings:
    return dataclasses.replace(HEADS, head=head, **values)


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_what_can_be_foreseen_is_learnt(tmp_path: Path, head: str) -> None:
    settings = of_kind(head, iters=120, learning_rate=1e-2, steps_per_eval=120, steps_per_report=20)
    settings = dataclasses.replace(settings, teacher="sample", num_draft_tokens=2)
    data = TrainData(texts(1, period=5), texts(1, period=5), "hash")  # a state tells what follows
    result, events = run(tmp_path, settings, data=data)
    reports = [event for event in events if isinstance(event, Reported)]
    assert set(reports[-1].terms) == {"base"}
    assert reports[-1].loss < 0.5 * reports[0].loss
    first, *_, last = [event.evaluation for event in events if isinstance(event, Evaluated)]
    assert first.tokens_per_step < 1.2 and last.tokens_per_step > 2.0
    config, _ = read_any_adapter(tmp_path)
    assert result.best is not None and config.acceptance == result.best.monotonic_acceptance()


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_only_the_heads_are_trained(tmp_path: Path, head: str) -> None:
    base = tiny_base()
    before = {name: mx.array(value) for name, value in flat(base).items()}
    model = new_adapter(MTPModel(base), of_kind(head))
    began = trainable(model)
    assert all(name.startswith("heads.") for name in began)
    run(tmp_path, of_kind(head), model=model)
    after = flat(base)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], value) for name, value in before.items())
    assert any(bool(mx.any(x != began[name]).item()) for name, x in trainable(model).items())


@pytest.mark.parametrize("rows", ROW_WEIGHTS)
@pytest.mark.parametrize("head", HEAD_KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, head: str, rows: str) -> None:
    settings = of_kind(head, row_weights=rows)
    whole, parts = model_for(settings), model_for(settings)
    run(tmp_path / "whole", settings, model=whole)
    stops = iter([False, False, True, True])
    run(tmp_path / "parts", settings, should_stop=lambda: next(stops), model=model_for(settings))
    result, _ = run(tmp_path / "parts", settings, resume=True, model=parts)
    assert result.finished
    left, right = trainable(whole), trainable(parts)
    assert left.keys() == right.keys()
    assert all(mx.array_equal(value, right[name]) for name, value in left.items())
    names = (CONFIG_FILE, WEIGHTS_FILE)
    files = [[(tmp_path / run / name).read_bytes() for name in names] for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_run_that_began_before_there_were_heads_is_resumed(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(SETTINGS, iters=2))
    state = newest_state(tmp_path / "training")
    assert state is not None
    for name in ("drafter", "head"):
        del state.values["identity"][name]
    save_state(tmp_path / "training", state)
    assert run(tmp_path, SETTINGS, resume=True)[0].step == 4
    with pytest.raises(ValueError, match="began with a different drafter"):
        run(tmp_path, HEADS, resume=True)


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_gradients_do_not_depend_on_how_forwards_are_cut(head: str) -> None:
    def gradient(settings: TrainSettings) -> Any:
        model = model_for(settings)
        parameters = {name: x + 0.02 for name, x in trainable(model).items()}
        return StepGradient(model, settings)(parameters, texts(2), [0, 1], step=3)

    whole = gradient(of_kind(head))
    assert whole.num_rows > 20
    CLOSE(whole, gradient(of_kind(head, rows_per_forward=5)))


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_a_folder_is_read_as_it_was_written(tmp_path: Path, head: str) -> None:
    path = save_tiny_model(tmp_path / "model")
    base, _ = load(str(path), mtp=False, kernels=False)
    settings = of_kind(head, iters=2)
    model = new_adapter(base, settings)
    run(tmp_path / "out", settings, model=model)
    loaded, _ = load(str(path), adapter_path=str(tmp_path / "out"))
    assert loaded.heads is not None and loaded.config is None
    assert loaded.heads.config == read_any_adapter(tmp_path / "out")[0]
    weights = adapter_tensors({f"heads.{name}": x for name, x in flat(loaded.heads).items()})
    written = read_any_adapter(tmp_path / "out")[1]
    assert weights.keys() == written.keys()
    assert all(mx.array_equal(weights[name], x.astype(mx.float32)) for name, x in written.items())


def test_heads_for_another_model_are_refused_in_one_line(tmp_path: Path) -> None:
    path, masks = save_tiny_pair(tmp_path)
    base, _ = load(str(path), mtp=False, kernels=False)
    settings, out = of_kind("mlp", iters=1), tmp_path / "out"
    run(out, settings, model=new_adapter(base, settings))
    other = save_tiny_model(tmp_path / "other", seed=5)

    def refused(model: Path) -> str:
        with pytest.raises(ValueError) as error:
            load(str(model), adapter_path=str(out))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "(fingerprint" in refused(other)
    values = json.loads((out / CONFIG_FILE).read_text())
    for name, value in {"base_vocab_size": 999, "base_hidden_size": 64}.items():
        (out / CONFIG_FILE).write_text(json.dumps(values | {name: value}))
        assert f"{value}" in refused(path) and "the adapter is for" in refused(path)
    (out / CONFIG_FILE).write_text(json.dumps(values | {"num_draft_tokens": 5, "acceptance": []}))
    assert "heads: " in refused(path)
    (out / CONFIG_FILE).write_text((masks / CONFIG_FILE).read_text())
    assert refused(path).startswith(str(out))
    (out / CONFIG_FILE).write_text(json.dumps(values))
    (out / WEIGHTS_FILE).write_bytes((out / WEIGHTS_FILE).read_bytes()[:-100])
    assert WEIGHTS_FILE in refused(path)
    with pytest.raises(ValueError, match="has independent heads, not mask tokens"):
        read_adapter(out)


@pytest.mark.parametrize("head", HEAD_KINDS)
@pytest.mark.parametrize("count", [2, 5])
def test_a_run_may_start_from_heads_with_another_number_of_them(
    tmp_path: Path, head: str, count: int
) -> None:
    settings = of_kind(head, iters=3)
    run(tmp_path / "one", settings)
    _, start = read_any_adapter(tmp_path / "one")
    more = dataclasses.replace(settings, num_draft_tokens=count)
    model = new_adapter(MTPModel(tiny_base()), more, start=tmp_path / "one")
    weights = adapter_tensors(trainable(model))
    assert model.heads is not None and model.heads.num_draft_tokens == count
    for index in range(count):
        source = min(index, settings.num_draft_tokens - 1)
        if head == "mlp":
            assert mx.array_equal(weights["weight"][index], start["weight"][source])
        else:
            name = "self_attn.q_proj.weight"
            own = weights[f"layers.{index}.{name}"]
            assert mx.array_equal(own, start[f"layers.{source}.{name}"])


def test_means_are_of_adapters_of_one_kind(tmp_path: Path) -> None:
    run(tmp_path / "a", of_kind("mlp", iters=2))
    run(tmp_path / "b", of_kind("mlp", iters=2, seed=3))
    run(tmp_path / "masks", dataclasses.replace(SETTINGS, iters=1))
    save_mean([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    mean, a, b = (read_any_adapter(tmp_path / name)[1]["weight"] for name in ("mean", "a", "b"))
    assert mx.allclose(mean, (a + b) / 2, atol=1e-3)
    with pytest.raises(ValueError, match="are adapters of different kinds"):
        save_mean([tmp_path / "a", tmp_path / "masks"], tmp_path / "none")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"gate": False}, "they have no gate to omit"),
        ({"grad_checkpoint": True}, "grad_checkpoint is for mask rows"),
        ({"base_weight": 0.0}, "heads have no other loss"),
        ({"head": "tree"}, "head must be one of mlp, layer"),
        ({"drafter": "tree"}, "drafter must be one of mask, heads"),
    ],
)
def test_settings_that_heads_do_not_have_are_refused(values: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(HEADS, **values)


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_the_estimate_grows_with_what_heads_are_made_of(head: str) -> None:
    def parts(**values: Any) -> Any:
        settings = of_kind(head, **values)
        return estimate(model_for(settings), settings, longest=40)

    few, many = parts(num_draft_tokens=2), parts(num_draft_tokens=4)
    assert 0 < few.trainable_bytes * 2 == many.trainable_bytes
    assert 0 < few.activation_bytes < many.activation_bytes
    assert few.weights_bytes == many.weights_bytes
