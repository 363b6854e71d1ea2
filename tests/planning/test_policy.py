"""The best layouts: against every rule there is, and against every step for larger ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.planning.policy import (
    PLAIN,
    RESET_PROB,
    Action,
    Policy,
    _evaluate,
    accepted_probs,
    best_policy,
    expected_tokens,
    step_ms,
)


def plans(k: int, most_rows: int, *, waiting: int) -> Iterator[Action]:
    for drafts in range(waiting + 1):
        for counts in itertools.product(range(k + 1), repeat=drafts + 1):
            if (plan := Action(drafts, counts)).num_rows <= most_rows:
                yield plan


def problem(k: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chances that drafts hold, and costs from flat to steep, with jumps."""
    rng = np.random.default_rng(seed)
    holds = np.concatenate([[1.0], np.cumprod(rng.uniform(0, 1, k))])
    added = rng.exponential(rng.uniform(0, 0.6), rows) * (rng.uniform(0, 1, rows) < 0.7)
    forward = np.concatenate([[0.0, 1.0], 1 + np.cumsum(added)])[: rows + 1]
    return holds, forward, np.concatenate([[0.0], np.cumsum(rng.exponential(0.05, k))])


def step_value(
    action: Action,
    policy: Policy,
    prefix_probs: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
) -> float:
    """Value of an action in tokens if the policy follows it."""
    emitted = expected_tokens(prefix_probs, action.num_draft_tokens)
    probs = accepted_probs(prefix_probs, action.num_draft_tokens)
    later = float(probs @ policy.values[list(action.mask_counts)]) * (1 - RESET_PROB)
    return emitted - policy.rate * step_ms(action, forward_ms, draft_ms) + later


@given(st.integers(1, 2), st.integers(1, 5), st.integers(0, 10**6))
def test_no_rule_of_all_is_faster(k: int, rows: int, seed: int) -> None:
    given_ = problem(k, rows, seed)
    choices = [list(plans(k, rows, waiting=waiting)) for waiting in range(k + 1)]
    fastest = max(_evaluate(rule, *given_)[0] for rule in itertools.product(*choices))
    assert best_policy(*given_).rate == pytest.approx(fastest, rel=1e-9)


@given(st.integers(3, 4), st.integers(6, 14), st.integers(0, 10**6))
def test_no_step_of_all_is_worth_more(k: int, rows: int, seed: int) -> None:
    holds, forward, draft = problem(k, rows, seed)
    found = best_policy(holds, forward, draft)
    for waiting, plan in enumerate(found.actions):
        value = step_value(plan, found, holds, forward, draft)
        assert value == pytest.approx(found.values[waiting], abs=1e-9)
        for other in plans(k, rows, waiting=waiting):
            assert step_value(other, found, holds, forward, draft) <= value + 1e-9


@given(st.integers(1, 8), st.integers(0, 10**6))
def test_where_it_starts_does_not_matter(k: int, seed: int) -> None:
    one, other = problem(k, 24, seed), problem(k, 24, seed + 1)
    cold = best_policy(*one)
    warm = best_policy(*one, start=best_policy(*other))
    assert warm.rate == pytest.approx(cold.rate, rel=1e-9)


def simulated_rate(
    rule: Policy, holds: np.ndarray, forward: np.ndarray, draft: np.ndarray
) -> float:
    """Tokens a millisecond of 200,000 steps with random drafts."""
    rng = np.random.default_rng(0)
    waiting, tokens, ms = 0, 0, 0.0
    luck = rng.uniform(size=200_000)
    for each in luck:
        plan = rule.actions[waiting]
        held = int((each < holds[1 : plan.num_draft_tokens + 1]).sum())
        tokens += held + 1
        ms += forward[plan.num_rows] + draft[max(plan.mask_counts)]
        waiting = plan.mask_counts[held]
    return tokens / ms


def test_the_rate_is_what_decoding_reaches() -> None:
    holds, forward, draft = problem(4, 24, 3)
    rule = best_policy(holds, forward, draft)
    assert any(plan.num_draft_tokens for plan in rule.actions)
    assert simulated_rate(rule, holds, forward, draft) == pytest.approx(rule.rate, rel=0.01)


def test_flat_costs_ask_for_everything_and_steep_ones_for_nothing() -> None:
    holds = np.array([1, 0.9, 0.8, 0.7])
    draft = np.zeros(4)
    flat = best_policy(holds, np.ones(21), draft)
    assert flat.actions[3].num_draft_tokens == 3 and min(flat.actions[3].mask_counts) == 3
    steep = best_policy(holds, np.arange(21.0), draft)
    assert steep.actions[0] == PLAIN and steep.rate == pytest.approx(1.0)
    hopeless = best_policy(np.array([1.0, 0, 0, 0]), np.ones(21) + np.arange(21) * 1e-3, draft)
    assert hopeless.actions[0] == PLAIN


def test_a_jump_in_cost_is_not_stepped_over_for_little() -> None:
    """Rows beyond 8 cost twice as much: steps stay within 8."""
    forward = np.where(np.arange(33) <= 8, 1.0, 2.5)
    found = best_policy(np.array([1, 0.6, 0.35, 0.2, 0.1]), forward, np.zeros(5))
    assert max(plan.num_rows for plan in found.actions) <= 8


def test_chances() -> None:
    holds = np.array([1, 0.6, 0.3])
    assert expected_tokens(holds, 2) == pytest.approx(1.9)
    assert accepted_probs(holds, 2) == pytest.approx([0.4, 0.3, 0.3])
    assert accepted_probs(holds, 0) == pytest.approx([1.0])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="2 drafts need 3 draft times"):
        best_policy(np.array([1, 0.5, 0.2]), np.ones(5), np.zeros(2))
    with pytest.raises(ValueError, match="got 2 and 0"):
        best_policy(np.array([1, 0.5]), np.ones(1), np.zeros(2))
