"""Step costs of this machine: measured on real steps, stored by machine and model, printed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_mtp.calibration import stored_costs
from mlx_mtp.calibration.step_timer import wide_step
from mlx_mtp.calibration.stored_costs import (
    SPECULATIONS,
    calibrate,
    curve_lines,
    guessed_costs,
    measure_costs,
    measured_costs,
    speculation_for,
)
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.costs import CPU_GUESS, GPU_GUESS, SLOW_CPU_GUESS, CostCurve
from tests.helpers.tiny import tiny_mtp

CURVE = CostCurve(
    rows=(1, 8), contexts=(64,), forward_ms=((10.0, 20.0),), draft_ms=(0.0, 1.0), source="a test"
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def weights() -> MTPModel:
    return tiny_mtp("llama", k=4, num_hidden_layers=1, max_position_embeddings=512)


@pytest.fixture
def model(weights: MTPModel) -> MTPModel:
    """A model whose planner knows nothing yet."""
    SPECULATIONS.forget(weights)
    return weights


@pytest.mark.parametrize("k", range(9))
def test_the_measured_steps_have_the_rows_that_they_stand_for(k: int) -> None:
    for rows in stored_costs.ROWS:
        layout = wide_step(rows, k)
        assert layout.num_rows == rows and max(layout.mask_counts) <= k


def test_a_curve_is_measured(model: MTPModel) -> None:
    lines: list[str] = []
    curve = measure_costs(model, contexts=(16, 64), rounds=1, on_status=lines.append)
    assert curve.contexts == (16, 64) and curve.rows[:4] == (1, 2, 3, 4)
    assert len(curve.draft_ms) == 5 and curve.draft_ms[0] == 0.0
    assert len(lines) == 2 and "64 ids" in lines[1]
    assert len(curve_lines(curve)) >= len(curve.rows) + 1


def test_nothing_is_measured_unless_asked(model: MTPModel, monkeypatch) -> None:
    monkeypatch.setattr(stored_costs, "measure_costs", None)
    assert measured_costs(model) is None
    assert speculation_for(model).costs.curve == guessed_costs()
    assert speculation_for(model) is speculation_for(model)


@pytest.mark.parametrize(
    ("device", "blas", "guess"),
    [
        (mx.gpu, "system", GPU_GUESS),
        (mx.cpu, "openblas", CPU_GUESS),
        (mx.cpu, "reference", SLOW_CPU_GUESS),
    ],
)
def test_the_guess_is_for_the_device(device, blas: str, guess: CostCurve, monkeypatch) -> None:
    monkeypatch.setattr(stored_costs.mx, "default_device", lambda: SimpleNamespace(type=device))
    monkeypatch.setattr(stored_costs, "BLAS", blas)
    assert guessed_costs() == guess and guess.is_guess


def test_a_measurement_is_stored_and_repeated_when_asked(
    model: MTPModel, monkeypatch, tmp_path
) -> None:
    calls = []

    def measure(*_: object, **__: object) -> CostCurve:
        calls.append(1)
        return CURVE

    monkeypatch.setattr(stored_costs, "measure_costs", measure)
    before = speculation_for(model)
    assert calibrate(model) == calibrate(model) == measured_costs(model) == CURVE
    assert len(calls) == 1
    assert speculation_for(model) is before and before.costs.curve == CURVE
    calibrate(model, again=True)
    assert len(calls) == 2
    (file,) = (tmp_path / "costs").iterdir()
    damaged = json.loads(file.read_text()) | {"rows": [2]}
    for text in ("", "{}", "[]", json.dumps(damaged)):
        file.write_text(text)
        assert calibrate(model) == CURVE
    assert len(calls) == 6


def test_a_curve_of_another_machine_is_ignored(model: MTPModel, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(stored_costs, "measure_costs", lambda *_, **__: CURVE)
    calibrate(model)
    (file,) = (tmp_path / "costs").iterdir()
    for change in ({"made_for": "elsewhere"}, {"made_for": None}):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert measured_costs(model) is None
    assert calibrate(model) == measured_costs(model) == CURVE  # measured and stored again
    monkeypatch.setattr(stored_costs, "package_version", lambda: "9.9")
    file.rename(stored_costs._cache(model).path)  # as if copied from the older version
    assert measured_costs(model) is None


def test_another_version_or_machine_measures_for_itself(model: MTPModel, monkeypatch) -> None:
    def digest(model: MTPModel) -> str:
        return stored_costs._cache(model).digest

    first = digest(model)
    assert digest(model) == first
    monkeypatch.setattr(stored_costs.os, "cpu_count", lambda: 99)
    assert digest(model) != first
    monkeypatch.undo()
    monkeypatch.setattr(stored_costs, "package_version", lambda: "9.9")
    assert digest(model) != first
    monkeypatch.undo()
    assert digest(tiny_mtp("llama", k=4, num_hidden_layers=1, quantised=True)) != first


def test_a_short_context_is_measured_on_a_half_of_it() -> None:
    small = tiny_mtp("llama", k=2, num_hidden_layers=1, max_position_embeddings=24)
    curve = measure_costs(small, rounds=1)
    assert curve.contexts == (12,) and curve.rows[-1] <= 12
