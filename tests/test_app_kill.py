"""Kill -9 of the app while it streams: the history opens, a second of text is lost at most."""

from __future__ import annotations

import pytest
from app_kill import MOST_LOST_S, kill_once


@pytest.mark.slow
def test_the_history_survives_kill_9(tmp_path):
    outcomes = [kill_once(tmp_path / "history.sqlite3", seconds) for seconds in (0.6, 1.1, 1.7)]
    assert all(each.sent > 100 and each.kept > 0 for each in outcomes)
    assert max(each.lost_s for each in outcomes) <= MOST_LOST_S
