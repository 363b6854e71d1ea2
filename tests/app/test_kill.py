"""Kills of the app and of its engine while it streams: the history survives."""

from __future__ import annotations

import pytest

from tests.app.kill import MAX_ERROR_S, MAX_LOST_S, MAX_RETURN_S, kill_engine_often, kill_once


@pytest.mark.slow
def test_the_history_survives_kill_9(tmp_path):
    outcomes = [kill_once(tmp_path / "history.sqlite3", seconds) for seconds in (0.6, 1.1, 1.7)]
    assert all(each.sent > 100 and each.kept > 0 for each in outcomes)
    assert max(each.lost_s for each in outcomes) <= MAX_LOST_S


@pytest.mark.slow
def test_the_history_survives_deaths_of_the_engine(tmp_path):
    left = kill_engine_often(tmp_path / "history.sqlite3", 4)
    assert left.letters > 50
    assert left.error_s <= MAX_ERROR_S and left.return_s <= MAX_RETURN_S
