"""What rows cost here: measured on real steps, kept by machine and model, and told."""

from __future__ import annotations

import json

import pytest

from mlx_mtp.calibration import stored_costs as tuning
from mlx_mtp.calibration.step_timer import wide_step
from mlx_mtp.calibration.stored_costs import curve_lines, kept_costs, measure_costs, speculation_for
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.costs import UNMEASURED
from tests.helpers.tiny import tiny_mtp


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return tiny_mtp("llama", k=4, num_hidden_layers=1, max_position_embeddings=512)


@pytest.mark.parametrize("k", range(9))
def test_the_measured_steps_have_the_rows_that_they_stand_for(k: int) -> None:
    for rows in tuning.ROWS:
        layout = wide_step(rows, k)
        assert layout.num_rows == rows and max(layout.mask_counts) <= k


def test_a_curve_is_measured(model: MTPModel) -> None:
    told: list[str] = []
    curve = measure_costs(model, contexts=(16, 64), rounds=1, say=told.append)
    assert curve.contexts == (16, 64) and curve.rows[:4] == (1, 2, 3, 4)
    assert len(curve.draft_ms) == 5 and curve.draft_ms[0] == 0.0
    assert len(told) == 2 and "64 ids" in told[1]
    assert len(curve_lines(curve)) >= len(curve.rows) + 1


def test_it_is_kept_and_measured_again_when_asked(model: MTPModel, monkeypatch, tmp_path) -> None:
    calls = []

    def measured(*_: object, **__: object) -> object:
        calls.append(1)
        return UNMEASURED

    monkeypatch.setattr(tuning, "measure_costs", measured)
    assert kept_costs(model, measure=False) is None and not calls
    assert kept_costs(model) == kept_costs(model) == UNMEASURED
    assert len(calls) == 1
    kept_costs(model, again=True)
    assert len(calls) == 2
    (file,) = (tmp_path / "costs").iterdir()
    damaged = json.loads(file.read_text()) | {"rows": [2]}
    for text in ("", "{}", "[]", json.dumps(damaged)):
        file.write_text(text)
        assert kept_costs(model) == UNMEASURED
    assert len(calls) == 6


def test_a_curve_of_another_machine_is_ignored(model: MTPModel, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tuning, "measure_costs", lambda *_, **__: UNMEASURED)
    kept_costs(model)
    (file,) = (tmp_path / "costs").iterdir()
    for change in ({"made_for": "elsewhere"}, {"made_for": None}):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert kept_costs(model, measure=False) is None
    assert kept_costs(model) == UNMEASURED  # measured again, and kept again
    assert kept_costs(model, measure=False) == UNMEASURED
    monkeypatch.setattr(tuning, "package_version", lambda: "9.9")
    mine = tuning._digest(model)
    file.rename(file.with_name(f"{mine}.json"))  # as if copied from the older version
    assert kept_costs(model, measure=False) is None


def test_another_version_or_machine_measures_for_itself(model: MTPModel, monkeypatch) -> None:
    first = tuning._digest(model)
    assert tuning._digest(model) == first
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: 99)
    assert tuning._digest(model) != first
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "package_version", lambda: "9.9")
    assert tuning._digest(model) != first
    monkeypatch.undo()
    other = tiny_mtp("llama", k=4, num_hidden_layers=1, quantised=True)
    assert tuning._digest(other) != first


def test_a_model_has_one_planner_knowledge(model: MTPModel) -> None:
    guessed = speculation_for(model, measure=False)
    assert guessed.costs.curve is UNMEASURED
    assert speculation_for(model, measure=False) is guessed
    measured = speculation_for(model)
    assert measured.costs.curve.source.startswith("measured")
    assert speculation_for(model, measure=False) is measured


def test_a_short_context_is_measured_on_a_half_of_it() -> None:
    small = tiny_mtp("llama", k=2, num_hidden_layers=1, max_position_embeddings=24)
    curve = measure_costs(small, rounds=1)
    assert curve.contexts == (12,) and curve.rows[-1] <= 12
