"""Timing steps: which rounds can be trusted, and which are run again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.backends.device import waited_ms
from mlx_mtp.calibration.step_timer import (
    MAX_EXTRA_ROUNDS,
    MAX_SPREAD,
    MAX_WAITING,
    Round,
    StepTime,
    time_rounds,
)

TRUE_MS = 10.0
LATER = math.inf


def runs_of(rounds: list[Round]) -> tuple[Callable[[], Round], list[int]]:
    """Something that takes these times, one after the other, and how often it was run."""
    left, count = iter(rounds), [0]

    def run() -> Round:
        count[0] += 1
        return next(left)

    return run, count


class TestJudging:
    @given(st.lists(st.floats(0, 200), min_size=1, max_size=6))
    def test_what_waited_for_a_core_is_never_trusted_by_much(self, waits: list[float]) -> None:
        found = StepTime.of([Round(TRUE_MS + each, each) for each in waits])
        assert found.ms == TRUE_MS + min(waits)
        assert found.disturbed or found.ms <= TRUE_MS / (1 - MAX_WAITING) * (1 + 1e-9)

    @given(st.lists(st.floats(0, 0.2), min_size=2, max_size=6))
    def test_a_quiet_machine_is_trusted(self, noise: list[float]) -> None:
        found = StepTime.of([Round(TRUE_MS * (1 + each), 0.1) for each in noise])
        assert not found.disturbed and found.ms <= TRUE_MS * 1.2

    @pytest.mark.parametrize(
        ("rounds", "disturbed"),
        [
            ([Round(10)], False),
            ([Round(10, 3)], True),
            ([Round(10), Round(10 * MAX_SPREAD + 0.1)], True),
            ([Round(10), Round(11), Round(90)], False),  # two agree
            ([Round(1432, 958), Round(1371, 882), Round(1434, 941)], True),  # a load that lasts
            ([Round(30, 20), Round(10, 0), Round(10.5, 1)], False),  # the fastest did not wait
        ],
    )
    def test_by_hand(self, rounds: list[Round], disturbed: bool) -> None:
        assert StepTime.of(rounds).disturbed is disturbed


class TestRounds:
    def test_only_disturbed_ones_are_run_again_until_two_agree(self) -> None:
        quiet, of_quiet = runs_of([Round(10)] * 3)
        shaken, of_shaken = runs_of(
            [Round(99), Round(90), Round(55), Round(10), Round(55), Round(10)]
        )
        first, second = time_rounds([quiet, shaken], 2, LATER)
        assert (of_quiet[0], of_shaken[0]) == (3, 6)  # one round of each warms up
        assert first == second == StepTime(10, False)

    def test_they_end_where_the_machine_stays_busy(self) -> None:
        run, count = runs_of([Round(30, 20)] * 99)
        (found,) = time_rounds([run], 2, LATER)
        assert found == StepTime(30, True) and count[0] == 1 + 2 + MAX_EXTRA_ROUNDS

    def test_and_where_time_is_up(self) -> None:
        run, count = runs_of([Round(30, 20)] * 99)
        (found,) = time_rounds([run], 2, -math.inf)
        assert found.disturbed and count[0] == 3

    def test_steps_take_turns(self) -> None:
        order: list[int] = []

        def run_of(name: int) -> Callable[[], Round]:
            def run() -> Round:
                order.append(name)
                return Round(10)

            return run

        time_rounds([run_of(1), run_of(2)], 2, LATER)
        assert order == [1, 2] * 3


@pytest.fixture
def threads(tmp_path: Path) -> Iterator[Path]:
    for name, text in {"1": "500 2000000 7\n", "2": "1 500000 1\n", "3": "", "4": "x y"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "5").mkdir()  # ended meanwhile
    yield tmp_path


def test_waiting_is_summed_over_threads(threads: Path, tmp_path: Path) -> None:
    assert waited_ms(threads) == 2.5
    assert waited_ms(tmp_path / "nowhere") == 0.0  # not Linux
    assert waited_ms() >= 0
