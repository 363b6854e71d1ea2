"""PyTorch's gradient of a training step is MLX's, for every setting; bfloat16 is near."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import Parameters, StepGradient, StepResult
from mlx_mtp.train.settings import TrainSettings
from tests.backends.pytorch.test_model import exact_base
from tests.helpers.tiny import tiny_base

torch = pytest.importorskip("torch")

from mlx_mtp.train.gradient.torch_gradient import TorchGradient  # noqa: E402

SETTINGS = TrainSettings(
    num_draft_tokens=4, rank=4, batch_size=2, num_anchors=6, rows_per_forward=9, teacher="sample"
)
CASES: dict[str, dict[str, Any]] = {
    "sample": {},
    "argmax": {"teacher": "argmax"},
    "dist": {"teacher": "dist"},
    "late rows dropped": {"drop_late": 0.4, "rows_per_forward": 100},
    "candidates": {"candidates": 40},
    "dist over candidates": {"candidates": 40, "teacher": "dist"},
    "no sampler": {"sampler": False},
    "reach": {"row_weights": "reach", "drop_late": 0.3},
    "reach without a sampler": {"row_weights": "reach", "sampler": False},
    "other weights": {"base_weight": 0.5, "sampler_weight": 2.0, "lcm_weight": 0.0},
    "attention only": {"adapt": "attention"},
}
KINDS = ("llama", "qwen3", "gemma3_text")
DATA = [
    TokenSequence(
        np.random.default_rng(seed).integers(64, size=length).tolist(),
        [position >= 8 for position in range(length)],
    )
    for seed, length in enumerate((40, 26, 12))
]


def new_model(kind: str, settings: TrainSettings) -> MTPModel:
    return new_adapter(MTPModel(exact_base(kind), name="tiny"), settings)


def noisy(parameters: Parameters) -> Parameters:
    """Parameters of which no gradient is zero."""
    keys = mx.random.split(mx.random.key(1), len(parameters))
    return {
        name: value + 0.1 * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(parameters.items(), keys, strict=True)
    }


def results(
    kind: str, settings: TrainSettings, chosen: tuple[int, ...] = (0, 1, 2), **options: Any
) -> tuple[StepResult, StepResult]:
    """A step in MLX and in PyTorch."""
    model = new_model(kind, settings)
    parameters = noisy(trainable(model))
    theirs = TorchGradient(model, settings, device="cpu", **options)
    expected = StepGradient(model, settings)(parameters, DATA, chosen, step=3)
    return expected, theirs(parameters, DATA, chosen, step=3)


def error(expected: StepResult, actual: StepResult) -> float:
    """Norm of the difference of the gradients over that of MLX's."""
    assert list(expected.gradients) == list(actual.gradients)
    assert {value.dtype for value in actual.gradients.values()} == {mx.float32}
    pairs = [(np.array(expected.gradients[n]), np.array(v)) for n, v in actual.gradients.items()]
    difference = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return (difference / sum(float(np.square(a).sum()) for a, _ in pairs)) ** 0.5


@pytest.mark.parametrize(
    ("kind", "case"),
    [("llama", case) for case in CASES]
    + [(kind, case) for kind in KINDS[1:] for case in ("argmax", "late rows dropped", "reach")],
)
def test_losses_and_gradients_are_those_of_mlx(kind, case):
    settings = dataclasses.replace(SETTINGS, **CASES[case])
    expected, actual = results(kind, settings, dtype=torch.float32)
    assert error(expected, actual) < 2e-5
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    assert actual.terms == pytest.approx(expected.terms, rel=1e-5)
    assert (actual.num_rows, actual.num_tokens) == (expected.num_rows, expected.num_tokens)
    for name, value in expected.gradients.items():
        ours, theirs = np.array(value), np.array(actual.gradients[name])
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-4 * abs(ours).max(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near(kind):
    expected, actual = results(kind, SETTINGS, dtype=torch.bfloat16)
    assert error(expected, actual) < 0.2
    assert actual.loss == pytest.approx(expected.loss, rel=0.02)


def test_a_part_of_the_sequences_is_a_part_of_the_sum():
    model = new_model("llama", SETTINGS)
    parameters = noisy(trainable(model))
    gradient = TorchGradient(model, SETTINGS, device="cpu", dtype=torch.float32)
    whole = gradient(parameters, DATA, (0, 1), step=0)
    parts = [
        gradient.part(parameters, [(place, DATA[place])], step=0, total=whole.num_rows)
        for place in (0, 1)
    ]
    assert sum(part[1] for part in parts if part) == pytest.approx(whole.loss, rel=1e-6)
    assert gradient.part(parameters, [], step=0, total=whole.num_rows) is None


def test_the_same_step_has_the_same_bits():
    first, second = (results("llama", SETTINGS, dtype=torch.bfloat16)[1] for _ in range(2))
    pairs = zip(first.gradients.values(), second.gradients.values(), strict=True)
    assert all(mx.array_equal(a, b).item() for a, b in pairs)


def test_the_loss_falls_in_bfloat16():
    model = new_model("llama", SETTINGS)
    parameters = trainable(model)
    gradient = TorchGradient(model, SETTINGS, device="cpu", dtype=torch.bfloat16)
    losses = []
    for _ in range(6):
        result = gradient(parameters, DATA, (0, 1), step=0)
        losses.append(result.loss)
        norm = sum(float(np.square(np.array(g)).sum()) for g in result.gradients.values()) ** 0.5
        parameters = {
            name: value - 0.5 / norm * result.gradients[name] for name, value in parameters.items()
        }
    assert losses[-1] < 0.95 * losses[0]


def test_the_model_of_mlx_keeps_its_parameters():
    model = new_model("llama", SETTINGS)
    before = trainable(model)
    TorchGradient(model, SETTINGS, device="cpu")
    after = trainable(model)
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"drafter": "heads"}, "gated adapters of mask tokens only"),
        ({"gate": False}, "gated adapters of mask tokens only"),
        ({"grad_checkpoint": True}, "grad_checkpoint cannot be used"),
    ],
)
def test_what_it_cannot_train_is_refused(overrides, what):
    settings = dataclasses.replace(SETTINGS, **overrides)
    model = new_adapter(MTPModel(tiny_base("llama"), name="tiny"), settings)
    with pytest.raises(ValueError, match=what):
        TorchGradient(model, settings, device="cpu")
