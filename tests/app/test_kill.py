"""Kills of the app and of its engine while it streams: the history has what was sent."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest

from tests.app.kill import (
    MAX_ERROR_S,
    MAX_LOST_S,
    MAX_RETURN_S,
    all_texts,
    kill_engine_often,
    kill_once,
)


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.soak)])
def test_the_history_survives_kill_9(tmp_path, seed, kills):
    path, chance = tmp_path / "history.sqlite3", random.Random(seed)
    outcomes = [kill_once(path, chance.uniform(0.6, 2.0)) for _ in range(kills)]
    print(json.dumps([asdict(each) for each in outcomes]))
    assert all(each.sent > 100 and each.kept > 0 for each in outcomes)
    assert max(each.lost_s for each in outcomes) <= MAX_LOST_S
    assert len(all_texts(path)) == kills


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_the_history_survives_deaths_of_the_engine(tmp_path, seed, kills):
    outcome = kill_engine_often(tmp_path / "history.sqlite3", kills, seed=seed)
    print(json.dumps(asdict(outcome)))
    assert outcome.letters > 12 * kills
    assert outcome.error_s <= MAX_ERROR_S and outcome.return_s <= MAX_RETURN_S
