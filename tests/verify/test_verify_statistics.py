"""The statistics behind verification, against scipy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mlx_mtp.verify.chi_square import (
    Group,
    chi_square,
    chi_square_tail,
    holm,
    simulated_p_value,
)


@pytest.mark.parametrize("df", [1, 2, 5, 23, 128])
def test_chi_square_tail_agrees_with_scipy(df: int) -> None:
    for statistic in (0.0, 0.01, 1.0, 0.9 * df, df + 1.99, df + 2.01, 2.0 * df, 200.0, 900.0):
        expected = stats.chi2.sf(statistic, df)
        assert chi_square_tail(statistic, df) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_one_group_is_pearsons_test() -> None:
    counts, probs = np.array([30.0, 48, 22, 100]), np.array([0.2, 0.25, 0.1, 0.45])
    result = chi_square([Group(counts, probs)])
    expected = stats.chisquare(counts, probs * counts.sum())
    assert result is not None and result.df == 3
    assert result.statistic == pytest.approx(expected.statistic)
    assert result.p_value == pytest.approx(expected.pvalue)


def random_groups(rng: np.random.Generator, *, bias: float = 0.0) -> list[Group]:
    """Draws from 20 distributions over 4 bins; a bias moves that much probability to bin 0."""
    groups = []
    for _ in range(20):
        probs = rng.dirichlet(np.ones(4))
        drawn = (1 - bias) * probs + bias * np.eye(4)[0]
        groups.append(Group(rng.multinomial(100, drawn).astype(float), probs))
    return groups


def test_p_values_of_honest_groups_are_uniform() -> None:
    rng = np.random.default_rng(0)
    results = [chi_square(random_groups(rng)) for _ in range(400)]
    p_values = [result.p_value for result in results if result is not None]
    assert len(p_values) == 400
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_a_bias_is_found_in_groups_and_confirmed_by_simulation() -> None:
    groups = random_groups(np.random.default_rng(1), bias=0.08)
    result = chi_square(groups)
    assert result is not None and result.p_value < 1e-6
    assert simulated_p_value(groups, num_replicates=20_000, seed=0) < 1e-4


def test_simulated_p_value_agrees_where_both_hold() -> None:
    groups = random_groups(np.random.default_rng(2))
    result = chi_square(groups)
    assert result is not None
    simulated = simulated_p_value(groups, num_replicates=20_000, seed=0)
    assert simulated == pytest.approx(result.p_value, abs=0.1)


def test_too_few_or_certain_draws_make_no_test() -> None:
    assert chi_square([Group(np.array([2.0, 1]), np.array([0.5, 0.5]))]) is None
    assert chi_square([Group(np.array([500.0, 0]), np.array([1.0, 0]))]) is None


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
