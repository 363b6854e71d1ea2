"""The optimiser does what PyTorch's AdamW does, and its state is all that a resume needs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.train.gradient.adapter import trainable
from mlx_mtp.train.optimiser import Optimiser, ema_decay, is_decayed, schedule
from mlx_mtp.train.run.checkpoint import EMA, RAW
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.families import family_mtp
from tests.train.test_loop import change as loop_settings
from tests.train.test_loop import model_for

SHAPES = {
    "base.model.embed_tokens.mask_embeddings": (3, 8),
    "base.model.layers.0.q_proj.lora_a": (8, 4),
    "base.model.layers.0.q_proj.lora_b": (4, 6),
    "base.model.layers.0.experts.up_proj.lora_a": (2, 8, 4),
    "base.model.layers.0.experts.up_proj.lora_b": (2, 4, 5),
    "heads.bias": (3, 8),
    "sampler_head.linear_1.bias": (8,),
    "sampler_head.linear_1.weight": (8, 16),
    "sampler_head.norm_1.weight": (8,),
}
NOT_DECAYED = {
    "base.model.embed_tokens.mask_embeddings",
    "heads.bias",
    "sampler_head.linear_1.bias",
    "sampler_head.norm_1.weight",
}
SETTINGS = TrainSettings(
    iters=50, warmup=7, learning_rate=2e-2, weight_decay=0.1, clip=1.0, lora_b_rate=4.0, ema=0.8
)


def change(**values: Any) -> TrainSettings:
    return dataclasses.replace(SETTINGS, **values)


def draw(rng: np.random.Generator, scale: float = 1.0) -> dict[str, np.ndarray]:
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def arrays(values: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in values.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Gradients that differ in size by tensor and step; their norm is on both sides of 1."""
    rng = np.random.default_rng([7, step])
    values = draw(rng, scale=10 ** rng.uniform(-2.5, 0.5))
    return {name: value * np.float32(10 ** rng.uniform(-2, 0)) for name, value in values.items()}


def expected_rate(step: int, settings: TrainSettings) -> float:
    """The schedule in plain numbers."""
    warmup = min(settings.warmup, settings.iters - 1)
    if step < warmup:
        return settings.learning_rate * (1 / (warmup + 1) + step / warmup * warmup / (warmup + 1))
    share = min((step - warmup) / (settings.iters - warmup), 1)
    low = settings.min_learning_rate
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


@pytest.mark.parametrize("values", [{}, {"lora_b_rate": 1.0, "clip": 0.0}, {"ema": 0.0}], ids=str)
def test_fifty_steps_are_those_of_pytorch(values: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    settings = change(**values)
    began = draw(np.random.default_rng(1))
    ours = Optimiser(settings, arrays(began))
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in began.items()}
    groups = [
        {
            "params": [value],
            "weight_decay": 0.0 if name in NOT_DECAYED else settings.weight_decay,
            "rate": settings.lora_b_rate if name.endswith("lora_b") else 1.0,
        }
        for name, value in theirs.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    average = {name: value.detach().clone() for name, value in theirs.items()}
    clipped, longest = 0, 0.0
    for step in range(settings.iters):
        rate, sample = expected_rate(step, settings), gradients(step)
        for name, value in theirs.items():
            value.grad = torch.tensor(sample[name])
        for group in adamw.param_groups:
            group["lr"] = rate * group["rate"]
        bound = settings.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), bound)
        adamw.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        for name, value in theirs.items():
            average[name].lerp_(value.detach(), 1 - decay)

        scaled, ours_norm = ours.clip(arrays(sample))
        ours.update(scaled)
        assert ours_norm == pytest.approx(float(norm), rel=1e-6)
        assert ours.learning_rate == pytest.approx(rate, rel=1e-6)
        clipped += ours_norm > bound
        longest += rate * settings.lora_b_rate
        tolerance = 2e-5 * longest + 1e-6  # 1 - 0.999^t in float32; of the way that a weight can go
        for name, value in ours.parameters.items():
            assert value.dtype == mx.float32
            error = np.abs(np.array(value) - theirs[name].detach().numpy()).max()
            assert error <= tolerance, (step, name, error)
            if settings.ema:
                error = np.abs(np.array(ours.versions()[EMA][name]) - average[name].numpy()).max()
                assert error <= tolerance, (step, name, error)
    assert set(ours.versions()) == ({RAW, EMA} if settings.ema else {RAW})
    if settings.clip:
        assert 10 < clipped < 40
    for name, value in ours.parameters.items():
        assert np.abs(np.array(value) - began[name]).max() > 0.05


def test_only_matrices_are_decayed() -> None:
    settings = change(clip=0.0, warmup=0)
    began = draw(np.random.default_rng(2))
    optimiser = Optimiser(settings, arrays(began))
    optimiser.update({name: mx.zeros(shape) for name, shape in SHAPES.items()})
    for name, value in optimiser.parameters.items():
        rate = settings.learning_rate * (settings.lora_b_rate if name.endswith("lora_b") else 1)
        factor = 1.0 if name in NOT_DECAYED else 1 - rate * settings.weight_decay
        assert np.allclose(value, factor * began[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {}),
        ("heads", {"drafter": "heads"}),
        ("layers", {"drafter": "heads", "head": "layer"}),
        ("gemma3n", {}),
        ("qwen3_moe", {"adapt": "all"}),
    ],
)
def test_what_is_decayed_in_each_kind_of_adapter(family: str, values: dict[str, Any]) -> None:
    settings = loop_settings(**values)
    if family == "gemma3n":
        parameters = trainable(family_mtp(family))
    else:
        kind = "qwen3_moe" if family == "qwen3_moe" else "llama"
        parameters = trainable(model_for(settings, kind))
    for name, value in parameters.items():
        is_matrix = name.endswith(("lora_a", "lora_b", "linear_1.weight", "linear_2.weight"))
        is_matrix |= name.endswith("_proj.weight") or name == "heads.weight"
        assert is_decayed(name, value) == is_matrix, name
    assert len({is_decayed(name, value) for name, value in parameters.items()}) == 2


def test_lora_b_has_a_rate_of_its_own() -> None:
    began = draw(np.random.default_rng(2))
    moved = {}
    for rate in (1.0, 8.0):
        optimiser = Optimiser(change(lora_b_rate=rate, weight_decay=0.0), arrays(began))
        optimiser.update(arrays(gradients(0)))
        moved[rate] = {n: np.array(x) - began[n] for n, x in optimiser.parameters.items()}
    for name in SHAPES:
        factor = 8 if name.endswith("lora_b") else 1
        assert np.allclose(moved[8.0][name], factor * moved[1.0][name], rtol=1e-3, atol=1e-6), name


@given(
    iters=st.integers(1, 400),
    warmup=st.integers(0, 500),
    peak=st.floats(1e-6, 1.0),
    lowest=st.floats(0, 1),
)
def test_the_schedule_rises_once_and_falls_once(
    iters: int, warmup: int, peak: float, lowest: float
) -> None:
    settings = change(iters=iters, warmup=warmup, learning_rate=peak, min_learning_rate=lowest)
    steps = np.unique(np.append(np.linspace(0, iters + 5, 60).astype(int), min(warmup, iters - 1)))
    values = np.array([np.array(schedule(settings)(mx.array(int(step)))) for step in steps])
    wanted = [expected_rate(int(step), settings) for step in steps]
    assert np.allclose(values, wanted, rtol=2e-5, atol=2e-6 * peak)
    top = min(warmup, iters - 1)
    slack = 1e-6 * peak
    assert (values <= peak + slack).all() and (values[steps < iters] > -slack).all()
    assert (np.diff(values[steps <= top]) > 0).all()
    assert (np.diff(values[steps >= top]) <= slack).all()
    assert values[steps == top] == pytest.approx(peak, rel=1e-5)
    assert values[-1] == pytest.approx(lowest * peak, rel=1e-4, abs=slack)


@given(maximum=st.floats(0, 1, exclude_max=True), updates=st.integers(1, 3000))
def test_the_average_is_one_of_weights_that_add_up(maximum: float, updates: int) -> None:
    """Averages of the number 1 from 1 on are 1; from 0 on they lack the share of the start."""
    share = math.prod(ema_decay(maximum, update) for update in range(updates))
    assert share <= math.prod((1 + t) / (10 + t) for t in range(min(updates, 50)))
    assert ema_decay(maximum, updates) <= ema_decay(maximum, updates + 1) <= maximum
    if updates >= 50:
        assert share < 1e-4  # of a run of 50 steps, what it began with is gone


def state_after(settings: TrainSettings, steps: int) -> Optimiser:
    optimiser = Optimiser(settings, arrays(draw(np.random.default_rng(3))))
    for step in range(steps):
        optimiser.update(optimiser.clip(arrays(gradients(step)))[0])
    return optimiser


@pytest.mark.parametrize("values", [{}, {"ema": 0.0}, {"lora_b_rate": 1.0, "weight_decay": 0.0}])
def test_a_restored_state_goes_on_bit_by_bit(values: dict[str, Any]) -> None:
    settings = change(**values)
    whole, half = state_after(settings, 20), state_after(settings, 11)
    other = Optimiser(settings, arrays(draw(np.random.default_rng(9))))
    other.restore(half.tensors())
    assert other.learning_rate == half.learning_rate
    for step in range(11, 20):
        other.update(other.clip(arrays(gradients(step)))[0])
    left, right = whole.tensors(), other.tensors()
    assert left.keys() == right.keys()
    assert all(mx.array_equal(value, right[name]) for name, value in left.items())


def test_a_state_from_before_the_average_can_be_restored() -> None:
    raw = state_after(change(ema=0.0), 11).tensors()
    old = raw | {"optimizer.learning_rate": mx.array(0.1)}
    optimiser = Optimiser(SETTINGS, arrays(draw(np.random.default_rng(9))))
    optimiser.restore(old)
    assert set(optimiser.versions()) == {RAW}
    before = optimiser.parameters
    optimiser.update(optimiser.clip(arrays(gradients(11)))[0])
    versions = optimiser.versions()
    for name, value in versions[EMA].items():
        wanted = before[name] + 0.9 * (versions[RAW][name] - before[name])
        assert mx.allclose(value, wanted, rtol=1e-6, atol=1e-7)
    again = state_after(change(ema=0.0), 12).parameters
    assert all(mx.array_equal(value, again[name]) for name, value in versions[RAW].items())


def test_before_the_first_update_there_is_one_version() -> None:
    model = model_for(loop_settings())
    assert set(Optimiser(SETTINGS, trainable(model)).versions()) == {RAW}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"ema": -0.1}, "ema must be at least 0 and below 1"),
        ({"lora_b_rate": 0.0}, "lora_b_rate must be above 0"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        change(**values)
