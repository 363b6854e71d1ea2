"""The loop on tiny models: it learns, it leaves the model alone, it stops where it must."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.evaluation.acceptance import Evaluation, evaluate
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.loading import read_adapter
from mlx_mtp.model.fingerprint import _hash_of_norms, fingerprint
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.statistics import STATISTICS_FILE, read_statistics
from mlx_mtp.train.gradient.adapter import (
    adapter_tensors,
    new_adapter,
    read_state_adapter,
    trainable,
)
from mlx_mtp.train.gradient.step import (
    CheckpointedLayer,
    StepGradient,
    blocks_of,
    checkpoint_layers,
    sequences_of_step,
)
from mlx_mtp.train.loop import TrainData, TrainResult, train
from mlx_mtp.train.optimiser import schedule
from mlx_mtp.train.run.checkpoint import TrainState, read_state, save_state
from mlx_mtp.train.run.events import Evaluated, Event, Noticed, Reported, Saved, Stepped
from mlx_mtp.train.run.history import read_history
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.families import family_mtp
from tests.helpers.tiny import random_adapter, save_adapter, tiny_base

SETTINGS = TrainSettings(
    num_draft_tokens=3,
    rank=4,
    iters=4,
    batch_size=2,
    num_anchors=6,
    warmup=2,
    learning_rate=3e-3,
    steps_per_report=2,
    steps_per_eval=2,
    save_every=2,
    workers=1,
)


def texts(count: int = 6, *, seed: int = 1, period: int = 0) -> list[TokenSequence]:
    """Random texts of 20 ids; with a period they repeat themselves and can be foreseen."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(2, 40, 20)
        if period:
            ids = np.resize(ids[:period], 20)
        found.append(TokenSequence(ids.tolist(), [False] * 4 + [True] * 16))
    return found


def model_for(settings: TrainSettings, kind: str = "llama", **options: Any) -> MTPModel:
    return new_adapter(MTPModel(tiny_base(kind, **options)), settings)


def run(
    output: Path, settings: TrainSettings = SETTINGS, **options: Any
) -> tuple[TrainResult, list[Event]]:
    events: list[Event] = []
    model = options.pop("model", None) or model_for(settings)
    data = options.pop("data", None) or TrainData(texts(), texts(2, seed=2), "hash")
    return train(model, data, settings, output, on_event=events.append, **options), events


def change(**values: Any) -> TrainSettings:
    return dataclasses.replace(SETTINGS, **values)


def test_events_files_and_the_result_agree(tmp_path):
    result, events = run(tmp_path)
    assert result.step == 4 and result.finished
    kinds = [type(event) for event in events]
    assert kinds.count(Stepped) == 4 and kinds.count(Reported) == 2
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 2, 4]
    assert [event.step for event in events if isinstance(event, Saved)] == [0, 2, 4]
    history = read_history(tmp_path / "training" / "history.jsonl")
    assert [line["kind"] for line in history] == ["evaluation", *["report", "evaluation"] * 2]
    config, weights = read_adapter(tmp_path)
    assert config.num_draft_tokens == 3 and weights["mask_embeddings"].shape == (3, 32)
    best = max(line["tokens_per_step"] for line in history if line["kind"] == "evaluation")
    assert result.best is not None and result.best.tokens_per_step == best


def test_the_best_adapter_has_the_statistics_of_its_evaluation(tmp_path):
    held_out = [
        dataclasses.replace(text, kind=kind) for text, kind in zip(texts(2), "ab", strict=True)
    ]
    data = TrainData(texts(seed=3), held_out, "hash")
    result, _ = run(tmp_path / "whole", data=data)
    config, _ = read_adapter(tmp_path / "whole")
    found = read_statistics(tmp_path / "whole", config)
    assert found is not None and found.vocabulary is not None and result.best is not None
    assert found.total.acceptance == result.best.acceptance and set(found.kinds) == {"a", "b"}
    answers = Counter(token for text in data.train for token in text.ids[4:])
    assert dict(zip(found.vocabulary.ids, found.vocabulary.counts, strict=True)) == answers
    steps = iter([False, False, False, True])
    part, _ = run(tmp_path / "parts", data=data, should_stop=lambda: next(steps))
    assert not part.finished
    run(tmp_path / "parts", data=data, resume=True)
    for name in ("adapters.safetensors", "adapter_config.json", STATISTICS_FILE):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "parts" / name).read_bytes() == whole


def test_the_adapter_of_every_state_can_be_read(tmp_path):
    model = model_for(SETTINGS)
    run(tmp_path, model=model)
    config, last = read_state_adapter(tmp_path / "training" / "state-0000004")
    assert config.num_draft_tokens == 3 and config.acceptance == ()
    trained = adapter_tensors(trainable(model))
    assert set(last) == set(trained) == set(read_adapter(tmp_path)[1])
    assert all(mx.array_equal(value, trained[name]) for name, value in last.items())
    earlier = read_state_adapter(tmp_path / "training" / "state-0000002")[1]
    assert not mx.array_equal(earlier["mask_embeddings"], last["mask_embeddings"])
    with pytest.raises(ValueError, match="state-0000009 is damaged: .*state.json"):
        read_state_adapter(tmp_path / "training" / "state-0000009")


def test_what_can_be_foreseen_is_learnt(tmp_path):
    settings = change(iters=120, learning_rate=1e-2, steps_per_eval=40, teacher="sample")
    data = TrainData(texts(3, period=4), texts(3, period=4), "hash")
    result, events = run(tmp_path, settings, data=data)
    reports = [event for event in events if isinstance(event, Reported)]
    assert reports[-1].terms["sampler"] < 0.25 * reports[0].terms["sampler"]
    evaluations = [event.evaluation for event in events if isinstance(event, Evaluated)]
    assert evaluations[0].tokens_per_step < 1.5
    assert result.best is not None and result.best.tokens_per_step > 2.5


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_the_model_itself_keeps_its_bits(tmp_path, kind, quantised):
    base = tiny_base(kind, quantised=quantised)
    ids = mx.array([[3, 9, 4, 1, 30, 7]])
    frozen = {name: mx.array(value) for name, value in flat(base).items()}
    before = base(ids)
    model = new_adapter(MTPModel(base), SETTINGS)
    began = trainable(model)
    _, events = run(tmp_path, model=model)
    assert mx.array_equal(base(ids), before)
    cache = model.make_cache()
    assert mx.array_equal(model.logits(model(ids, cache=cache)), before)
    after = flat(base)
    for name, value in frozen.items():
        assert mx.array_equal(after[renamed(name, after)], value), name
    moved = [name for name, value in trainable(model).items() if mx.any(value != began[name])]
    assert len(moved) > 0.9 * len(began)
    losses = {event.next_token_loss for event in events if isinstance(event, Evaluated)}
    assert len(losses) == 1


def flat(base: Any) -> dict[str, mx.array]:
    found: Any = tree_flatten(base.parameters())
    return dict(found)


def renamed(name: str, after: dict[str, mx.array]) -> str:
    """Where a parameter stands once its module is wrapped."""
    path, _, leaf = name.rpartition(".")
    places = (name, f"{path}.linear.{leaf}", f"{path}.embedding.{leaf}", f"{path}.rope.{leaf}")
    return next(place for place in places if place in after)


def test_without_the_gate_the_model_changes_and_no_adapter_is_written(tmp_path):
    settings = change(gate=False, iters=6, learning_rate=2e-2, steps_per_eval=3)
    _, events = run(tmp_path, settings)
    losses = [event.next_token_loss for event in events if isinstance(event, Evaluated)]
    assert len(set(losses)) == 3
    assert not (tmp_path / "adapters.safetensors").exists()
    assert (tmp_path / "training" / "state-0000006").is_dir()


@pytest.mark.parametrize(
    "values",
    [
        {"teacher": "dist"},
        {"teacher": "sample", "drop_late": 0.4},
        {"candidates": 50},
        {"sampler": False, "lcm_weight": 0.0},
        {"grad_checkpoint": True},
        {"rows_per_forward": 4, "clip": 0.0},
        {"warmup": 0, "num_draft_tokens": 1},
        {"target_modules": ("q_proj", "down_proj")},
        {"row_weights": "reach", "drop_late": 0.3},
        {"row_weights": "reach", "sampler": False, "lora_b_rate": 4.0},
    ],
    ids=str,
)
def test_every_option_trains(tmp_path, values):
    settings = change(**values)
    result, events = run(tmp_path, settings)
    assert result.finished
    report = [event for event in events if isinstance(event, Reported)][-1]
    assert np.isfinite(report.loss) and report.rows_per_s > 0
    assert ("sampler" in report.terms) == settings.sampler
    config, _ = read_adapter(tmp_path)
    assert set(config.target_modules) <= set(settings.target_modules)


def test_another_number_of_processes_is_named_with_the_way_on(tmp_path, monkeypatch):
    run(tmp_path, change(iters=2, workers=1))
    monkeypatch.setattr("mlx_mtp.train.loop.worker_count", lambda wanted, **_: 3)
    with pytest.raises(ValueError, match=r"began with --workers 1,.* Resume it with that"):
        run(tmp_path, change(iters=3), resume=True)


def test_layers_are_not_computed_again_without_the_gate():
    with pytest.raises(ValueError, match="grad_checkpoint cannot be used without the gate"):
        change(gate=False, grad_checkpoint=True)


class TestGradients:
    def gradient(self, settings: TrainSettings, model: MTPModel | None = None) -> Any:
        model = model or model_for(settings)
        data = texts(2)
        return StepGradient(model, settings)(trainable(model), data, [0, 1], step=3)

    def close(self, left: Any, right: Any, *, atol: float = 1e-5) -> None:
        assert left.loss == pytest.approx(right.loss, rel=1e-5)
        assert left.gradients.keys() == right.gradients.keys()
        for name, value in left.gradients.items():
            assert np.allclose(value, right.gradients[name], atol=atol), name

    def test_do_not_depend_on_how_forwards_are_cut(self):
        whole = self.gradient(SETTINGS)
        assert whole.num_rows > 20
        self.close(whole, self.gradient(change(rows_per_forward=5)))

    @pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
    def test_are_the_same_when_layers_are_computed_again(self, kind):
        model = model_for(SETTINGS, kind)
        checkpoint_layers(model)
        left = self.gradient(SETTINGS, model_for(SETTINGS, kind))
        self.close(left, self.gradient(SETTINGS, model))

    @pytest.mark.parametrize(
        "family", ["gemma3n", "gemma4_text", "afm7", "deepseek_v3", "qwen3_5", "jamba"]
    )
    def test_are_the_same_where_layers_exchange_more_than_hidden_states(self, family, monkeypatch):
        settings = change(rows_per_forward=64)
        overrides: dict[str, Any] = {"num_kv_shared_layers": 2} if family == "gemma4_text" else {}
        left = self.gradient(settings, family_mtp(family, **overrides))
        model = family_mtp(family, **overrides)
        checkpoint_layers(model)
        called, call = set(), CheckpointedLayer.__call__

        def counted(layer: CheckpointedLayer, *args: Any, **kwargs: Any) -> Any:
            called.add(id(layer.wrapped))
            return call(layer, *args, **kwargs)

        monkeypatch.setattr(CheckpointedLayer, "__call__", counted)
        self.close(left, self.gradient(settings, model))
        assert len(called) == len(model.base.layers)

    @pytest.mark.parametrize(("dtype", "bound"), [(mx.float16, 0.04), (mx.bfloat16, 0.25)])
    def test_of_half_precision_do_not_get_lost_in_a_large_step(self, dtype, bound):
        settings = change(teacher="sample")  # the likeliest token may be another in half precision
        base = tiny_base(vocab_size=20_000)
        model = new_adapter(MTPModel(base), settings)
        data, noise = list(enumerate(texts(2))), mx.random.key(0)
        parameters = {
            name: value + 0.05 * mx.random.normal(value.shape, key=noise)
            for name, value in trainable(model).items()
        }
        whole = StepGradient(model, settings).part(parameters, data, step=3, total=8000)
        base.set_dtype(dtype)
        half = StepGradient(model, settings).part(parameters, data, step=3, total=8000)
        assert whole is not None and half is not None
        assert half[1] == pytest.approx(whole[1], rel=0.02)
        for name, value in half[0].items():
            assert value.dtype == mx.float32
            wanted = np.array(whole[0][name])
            assert np.linalg.norm(np.array(value) - wanted) <= bound * np.linalg.norm(wanted), name


class TestStops:
    def test_when_asked_and_goes_on_from_there(self, tmp_path):
        steps = iter([False, False, False, True])
        settings = change(iters=8, save_every=100)
        result, _ = run(tmp_path / "a", settings, should_stop=lambda: next(steps))
        assert (result.step, result.finished) == (3, False)
        result, events = run(tmp_path / "a", settings, resume=True)
        assert result.finished and isinstance(events[0], Stepped) and events[0].step == 4
        run(tmp_path / "b", settings)
        both = [read_adapter(tmp_path / name)[1] for name in "ab"]
        assert all(mx.array_equal(both[0][name], both[1][name]) for name in both[0])

    def test_a_damaged_state_is_told_and_the_one_before_it_taken(self, tmp_path):
        run(tmp_path)
        (tmp_path / "training" / "state-0000004" / "state.json").write_text("{}")
        result, events = run(tmp_path, resume=True)
        assert isinstance(events[0], Noticed) and "state-0000004 is damaged" in events[0].text
        assert isinstance(events[1], Stepped) and events[1].step == 3 and result.finished

    def test_at_a_loss_that_is_no_number(self, tmp_path):
        model = model_for(SETTINGS)
        run(tmp_path, change(iters=2), model=model)
        kept = sorted(path.name for path in (tmp_path / "training").iterdir())
        broken = model_for(change(iters=6))
        broken.base.model.norm.weight = broken.base.model.norm.weight * mx.nan
        with pytest.raises(
            ValueError, match=r"the loss of step 3 is not finite, .* sequences \d, \d"
        ):
            run(tmp_path, change(iters=6), model=broken, resume=True)
        assert sorted(path.name for path in (tmp_path / "training").iterdir()) == kept

    def test_before_it_begins_with_another_runs_state(self, tmp_path):
        run(tmp_path)
        with pytest.raises(ValueError, match="different rank"):
            run(tmp_path, change(rank=8), resume=True)
        other = TrainData(texts(), texts(2, seed=2), "other")
        with pytest.raises(ValueError, match="different data_hash"):
            run(tmp_path, data=other, resume=True)
        with pytest.raises(ValueError, match="no checkpoint"):
            run(tmp_path / "new", resume=True)


class TestAdapters:
    def test_a_new_one_changes_no_draft_of_the_base_models_head(self):
        model = model_for(SETTINGS)
        tensors = adapter_tensors(trainable(model))
        assert all(not value.any() for name, value in tensors.items() if name.endswith("lora_b"))
        assert not tensors["sampler_head.norm_2.weight"].any()

    def test_one_that_is_continued_may_grow(self, tmp_path):
        base = tiny_base()
        config, weights = random_adapter(base, k=2)
        start = save_adapter(tmp_path, config, weights)
        model = new_adapter(MTPModel(base), SETTINGS, start=start)
        assert model.num_draft_tokens == 3
        found = adapter_tensors(trainable(model))
        assert found.keys() == weights.keys()
        masks = found.pop("mask_embeddings")
        assert mx.array_equal(masks[:2], weights["mask_embeddings"])
        assert mx.array_equal(masks[2], masks[1])
        for name, value in found.items():
            assert mx.allclose(value, weights[name], atol=1e-3)

    def test_one_with_a_former_fingerprint_gets_the_present_one(self, tmp_path):
        base = tiny_base()
        config, weights = random_adapter(base, k=3)
        former = dataclasses.replace(config, base_fingerprint=_hash_of_norms(base).hexdigest())
        model = new_adapter(MTPModel(base), SETTINGS, start=save_adapter(tmp_path, former, weights))
        assert model.config is not None
        assert model.config.base_fingerprint == fingerprint(base) != former.base_fingerprint

    def test_a_model_without_the_layers_is_refused(self):
        with pytest.raises(ValueError, match="no linear layer named nothing"):
            model_for(change(target_modules=("nothing",)))

    def test_fused_projections_count_among_the_defaults(self):
        config = model_for(SETTINGS, "phi3").config
        assert config is not None
        assert set(config.target_modules) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_every_sequence_comes_once_before_any_comes_again():
    steps = [sequences_of_step(at, num_sequences=5, batch_size=3, seed=9) for at in range(10)]
    places = [index for step in steps for index in step]
    for start in range(0, 30, 5):
        assert sorted(places[start : start + 5]) == [0, 1, 2, 3, 4]
    assert places[:5] != places[5:10]


def test_anchors_depend_on_seed_step_and_place_alone():
    sequence = texts(1)[0]
    one = blocks_of(sequence, SETTINGS, key=(4, 1))
    assert one == blocks_of(sequence, SETTINGS, key=(4, 1))
    others = [
        blocks_of(sequence, SETTINGS, key=(4, 0)),
        blocks_of(sequence, SETTINGS, key=(5, 1)),
        blocks_of(sequence, change(seed=1), key=(4, 1)),
    ]
    assert all(other.anchors != one.anchors for other in others)


def test_the_learning_rate_rises_and_falls():
    rate = schedule(change(iters=100, warmup=10, learning_rate=1.0, min_learning_rate=0.1))
    values = [float(np.array(rate(mx.array(step)))) for step in range(101)]
    assert 0 < values[0] < 0.2 and values[10] == pytest.approx(1.0, abs=0.02)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[100] == pytest.approx(0.1, abs=1e-3)


class TestAverage:
    """The moving average of the weights in a run."""

    def favour(self, monkeypatch: pytest.MonkeyPatch, better: list[str]) -> None:
        """Make one version of the weights the better one at each evaluation after the first."""
        names: list[str] = []

        def scripted(*args: Any, **kwargs: Any) -> Evaluation:
            result = evaluate(*args, **kwargs)
            call, names[:] = len(names), [*names, ""]
            if not call:
                return dataclasses.replace(result, tokens_per_step=1.0)
            at, is_ema = divmod(call - 1, 2)
            wins = better[at] == ("ema" if is_ema else "raw")
            return dataclasses.replace(result, tokens_per_step=2.0 + at + 0.5 * wins)

        monkeypatch.setattr("mlx_mtp.train.loop.evaluate", scripted)

    @pytest.mark.parametrize("better", ["raw", "ema"])
    def test_or_the_newest_weights_are_kept_whichever_draft_better(
        self, tmp_path, monkeypatch, better
    ):
        self.favour(monkeypatch, ["raw", better])
        result, events = run(tmp_path)
        assert (result.best_step, result.best_weights) == (4, better)
        evaluations = [event for event in events if isinstance(event, Evaluated)]
        assert [event.weights for event in evaluations] == ["raw", "raw", better]
        assert [list(event.results) for event in evaluations] == [["raw"], *[["raw", "ema"]] * 2]
        lines = read_history(tmp_path / "training" / "history.jsonl")
        last = lines[-1]
        assert last["weights"] == better and last["is_best"]
        assert last["results"][better]["tokens_per_step"] == last["tokens_per_step"] == 3.5
        other = "raw" if better == "ema" else "ema"
        assert last["results"][other]["tokens_per_step"] == 3.0
        state = tmp_path / "training" / "state-0000004"
        versions = {name: read_state_adapter(state / name)[1] for name in ("raw", "ema")}
        kept = read_adapter(tmp_path)[1]
        for name, value in kept.items():
            assert mx.array_equal(value, versions[better][name].astype(mx.float16)), name
        assert any(
            not mx.array_equal(value.astype(mx.float16), kept[name])
            for name, value in versions[other].items()
        )

    def test_is_evaluated_with_its_own_weights(self, tmp_path):
        """Each result is what ``evaluate`` says about the weights in the state."""
        settings = change(iters=30, learning_rate=1e-2, steps_per_eval=30, teacher="sample")
        data = TrainData(texts(3, period=4), texts(3, period=4), "hash")
        _, events = run(tmp_path, settings, data=data)
        last = [event for event in events if isinstance(event, Evaluated)][-1]
        model = model_for(settings)
        names = {tensor: name for name, tensor in zip(*named(model), strict=True)}
        for weights, result in last.results.items():
            tensors = read_state_adapter(tmp_path / "training" / "state-0000030" / weights)[1]
            model.load_weights([(names[name], x) for name, x in tensors.items()], strict=False)
            assert evaluate(model, data.held_out) == result
        assert last.evaluation == last.results[last.weights]
        assert len({result.num_steps for result in last.results.values()}) == 2

    def test_does_not_change_the_steps(self, tmp_path):
        models = [model_for(SETTINGS) for _ in range(2)]
        events = [
            run(tmp_path / str(ema), change(ema=ema), model=model)[1]
            for ema, model in zip((0.0, 0.9), models, strict=True)
        ]
        left, right = map(trainable, models)
        assert all(mx.array_equal(value, right[name]) for name, value in left.items())
        alone = [event for event in events[0] if isinstance(event, Evaluated)]
        assert all(list(event.results) == ["raw"] for event in alone)
        both = [event for event in events[1] if isinstance(event, Evaluated)]
        assert [e.results["raw"] for e in alone] == [e.results["raw"] for e in both]
        with pytest.raises(ValueError, match="state-0000004 has no ema weights"):
            read_state_adapter(tmp_path / "0.0" / "training" / "state-0000004" / "ema")

    def test_begins_at_the_weights_of_an_old_state(self, tmp_path):
        """A run of before there was an average, a rate of lora_b or weights of rows."""
        stops = iter([False, False, True])
        run(tmp_path, should_stop=lambda: next(stops))
        path = tmp_path / "training" / "state-0000002"
        state = read_state(path)
        tensors = {n: x for n, x in state.tensors.items() if not n.startswith("ema")}
        values = {key: x for key, x in state.values.items() if key != "best_weights"}
        new = ("ema", "lora_b_rate", "row_weights")
        values["identity"] = {k: x for k, x in values["identity"].items() if k not in new}
        tensors["optimizer.learning_rate"] = mx.array(1e-3)
        save_state(path.parent, TrainState(step=2, tensors=tensors, values=values))
        result, events = run(tmp_path, resume=True)
        assert result.finished
        assert list([e for e in events if isinstance(e, Evaluated)][-1].results) == ["raw", "ema"]
        whole = model_for(SETTINGS)
        run(tmp_path / "whole", model=whole)
        last = read_state(tmp_path / "training" / "state-0000004").tensors
        wanted = read_state(tmp_path / "whole" / "training" / "state-0000004").tensors
        assert last.keys() == wanted.keys()
        for name, value in last.items():
            if not name.startswith("ema"):
                assert mx.array_equal(value, wanted[name]), name

    @pytest.mark.parametrize(
        "values", [{"ema": 0.9}, {"lora_b_rate": 2.0}, {"row_weights": "reach"}], ids=str
    )
    def test_settings_cannot_change_in_a_run(self, tmp_path, values):
        run(tmp_path, change(iters=2))
        with pytest.raises(ValueError, match=f"different {next(iter(values))}"):
            run(tmp_path, change(**values), resume=True)


def named(model: MTPModel) -> tuple[list[str], list[str]]:
    """Names of the parameters of a model, and of their tensors in a file."""
    parameters = trainable(model)
    return list(parameters), list(adapter_tensors(parameters))
