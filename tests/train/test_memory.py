"""A run that does not fit is refused with advice that fits what is too large."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.run.memory import MemoryEstimate, estimate
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.tiny import tiny_base

SMALL = MemoryEstimate(
    weights_bytes=1, trainable_bytes=1, optimizer_bytes=1, ordinary_bytes=1,
    activation_bytes=1, logits_bytes=1, available_bytes=10**9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        ("weights_bytes", "smaller model"),
        ("trainable_bytes", "--rank"),
        ("optimizer_bytes", "--rank"),
        ("ordinary_bytes", "--max-seq-length"),
        ("activation_bytes", "--grad-checkpoint"),
        ("logits_bytes", "--rows-per-forward"),
    ],
)
def test_the_advice_fits_what_is_too_large(part: str, advice: str) -> None:
    SMALL.check()
    with pytest.raises(ValueError, match=f"about 31.2 GB of memory, but 1.0 GB are .*{advice}"):
        dataclasses.replace(SMALL, **{part: int(31.2e9)}).check()


def test_the_parts_grow_with_what_they_are_made_of() -> None:
    model = new_adapter(MTPModel(tiny_base()), TrainSettings(rank=4))
    few = estimate(model, TrainSettings(rows_per_forward=64), longest=256)
    many = estimate(model, TrainSettings(rows_per_forward=256), longest=256)
    kept = estimate(model, TrainSettings(rows_per_forward=64, grad_checkpoint=True), longest=256)
    assert many.activation_bytes > 3 * few.activation_bytes
    assert many.logits_bytes == pytest.approx(4 * few.logits_bytes, abs=4)
    assert kept.activation_bytes < few.activation_bytes
    assert estimate(model, TrainSettings(), longest=1024).total_bytes > few.total_bytes
    assert few.lines()[-1].startswith("available") and len(few.lines()) == 8


def test_every_process_counts() -> None:
    alone = TrainSettings(rank=4, batch_size=3, workers=1)
    model = new_adapter(MTPModel(tiny_base()), alone)
    one = estimate(model, alone, longest=256)
    three = estimate(model, dataclasses.replace(alone, workers=8), longest=256)
    for part in ("weights_bytes", "ordinary_bytes", "activation_bytes", "logits_bytes"):
        assert getattr(three, part) == 3 * getattr(one, part), part
    assert three.trainable_bytes > 3 * one.trainable_bytes
    assert three.optimizer_bytes == one.optimizer_bytes


def test_the_average_is_a_third_copy() -> None:
    model = new_adapter(MTPModel(tiny_base()), TrainSettings(rank=4))
    sizes = [
        estimate(model, TrainSettings(rank=4, ema=ema), longest=64).optimizer_bytes
        for ema in (0.0, 0.9)
    ]
    assert 2 * sizes[1] == 3 * sizes[0] > 0


def test_candidates_take_less_than_the_whole_vocabulary() -> None:
    settings = TrainSettings(rank=4, rows_per_forward=64)
    model = new_adapter(MTPModel(tiny_base(vocab_size=4096)), settings)
    sizes = [
        estimate(model, dataclasses.replace(settings, candidates=count), longest=64).logits_bytes
        for count in (256, 1024, 0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < 0.7 * sizes[2]


def test_the_estimate_is_near_the_peak_of_a_step() -> None:
    settings = TrainSettings(num_draft_tokens=4, rank=4, rows_per_forward=64, workers=1)
    base = tiny_base(vocab_size=4096, hidden_size=64, intermediate_size=192)
    model = new_adapter(MTPModel(base), settings)
    ids = np.random.default_rng(0).integers(0, 4096, 128).tolist()
    data = [TokenSequence(ids, [False] * 8 + [True] * 120)]
    parameters, gradient = trainable(model), StepGradient(model, settings)
    mx.eval(parameters, gradient(parameters, data, [0], step=0).gradients)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(parameters, data, [0], step=1).gradients)
    found = estimate(model, settings, longest=128)
    own = sum(value.nbytes for value in parameters.values())
    step = found.total_bytes - found.weights_bytes - found.optimizer_bytes - own
    assert 0.7 < step / (mx.get_peak_memory() - before) < 1.5
