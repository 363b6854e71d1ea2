"""Steps with trees: what is verified, where masks go, and what the planner knows of nodes."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.model.layout import StepLayout, subtree_parents
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.planning.offer import Offer, OfferedTree
from mlx_mtp.planning.plan import MASK, Plan
from mlx_mtp.planning.planner import make_planner
from mlx_mtp.planning.policy import (
    RESET_PROB,
    accepted_probs,
    best_policy,
    expected_tokens,
)
from mlx_mtp.planning.tree import LAG, TreeStep, best_step, nearest_masks, worth_by_lag
from mlx_mtp.planning.tree_acceptance import TreeAcceptance

VALUES = np.array([0.0, 0.6, 1.0, 1.2, 1.3])
WORTH = worth_by_lag(VALUES)
SHARES = (0.6, 0.35, 0.2, 0.1)


def random_tree(seed: int, *, width: int = 3, depth: int = 4) -> OfferedTree:
    """A tree like a beam's: ``width`` nodes at each depth, after random nodes of the last."""
    rng = np.random.default_rng(seed)
    parents, probs, before = list[int](), list[float](), [0]
    for _ in range(depth):
        chosen = np.sort(rng.choice(before, width))
        for parent in set(chosen.tolist()):
            count = int((chosen == parent).sum())
            shares = np.sort(rng.dirichlet(np.full(count + 1, 0.7))[:count])[::-1]
            parents += [parent] * count
            probs += shares.tolist()
        before = list(range(len(parents) - width + 1, len(parents) + 1))
    return OfferedTree(np.array(parents), np.array(probs))


def step_of(tree: OfferedTree, rows: int, **changes: Any) -> TreeStep:
    """The best step of up to so many rows, which cost nothing."""
    options = {"rate": 0.0, "room": 100, **changes}
    return best_step(tree, WORTH, np.ones(rows + 1), np.zeros(len(VALUES)), **options)


def worth(tree: OfferedTree, nodes: tuple[int, ...], masks: tuple[int, ...]) -> float:
    """The value of a step by the formula, one place of the last accepted node after the other."""
    parents = subtree_parents(tree.parents, nodes)
    steps, depths, reach = np.diff(VALUES), [0], [1.0]
    for node, parent in zip(nodes, parents, strict=True):
        depths.append(depths[parent] + 1)
        reach.append(float(tree.probs[node - 1]) * reach[parent])
    value = 0.0
    for node, line in enumerate(nearest_masks(parents, masks)):
        children = sum(reach[child + 1] for child, parent in enumerate(parents) if parent == node)
        later = sum(
            step * LAG[depths[node] - depths[source]]
            for step, (source, _) in zip(steps, line, strict=False)
        )
        value += reach[node] + (1 - RESET_PROB) * (reach[node] - children) * later
    return value


def is_closed(tree: OfferedTree, nodes: tuple[int, ...]) -> bool:
    return all(tree.parents[node - 1] in (0, *nodes) for node in nodes)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 30), room=st.integers(1, 8))
def test_steps_keep_to_the_tree_the_rows_and_the_room(seed: int, rows: int, room: int) -> None:
    tree = random_tree(seed)
    step = step_of(tree, rows, room=room)
    assert list(step.nodes) == sorted(set(step.nodes))
    assert is_closed(tree, step.nodes)
    assert 1 + len(step.nodes) + sum(step.mask_counts) <= rows
    layout = StepLayout(
        1, len(step.nodes), step.mask_counts, subtree_parents(tree.parents, step.nodes)
    )
    for depth, count in zip(layout.depths.tolist(), step.mask_counts, strict=True):
        assert depth < room
        assert count == 0 or depth + count <= room - 2  # drafts that can still be emitted
    if room == 8:
        assert step.value == pytest.approx(worth(tree, step.nodes, step.mask_counts))
    assert step_of(tree, rows + 1, room=room).value >= step.value - 1e-9


def exhaustive(tree: OfferedTree, rows: int) -> float:
    """The value of the best of all steps of up to so many rows."""
    all_nodes, best = range(1, len(tree.probs) + 1), 0.0
    for count in range(min(rows, len(tree.probs) + 1)):
        closed = (each for each in combinations(all_nodes, count) if is_closed(tree, each))
        for nodes in closed:
            for masks in product(range(len(VALUES)), repeat=count + 1):
                if sum(masks) == rows - 1 - count:
                    best = max(best, worth(tree, nodes, masks))
    return best


def test_steps_are_nearly_the_best_of_all() -> None:
    found, best = [], []
    for seed in range(6):
        tree = random_tree(seed, width=2, depth=2)
        for rows in (3, 5, 7):
            step = step_of(tree, rows)
            found.append(worth(tree, step.nodes, step.mask_counts))
            best.append(exhaustive(tree, rows))
    assert all(f <= b + 1e-9 for f, b in zip(found, best, strict=True))
    assert np.mean(found) > 0.98 * np.mean(best)


def test_masks_serve_the_places_after_them() -> None:
    # 0 has two masks, 1 (after 0) none, 2 (after 1) one, 3 (after 0) three
    assert nearest_masks((0, 1, 0), (2, 0, 1, 3)) == [
        [(0, 0), (0, 1)],
        [(0, 1)],
        [(2, 0)],
        [(3, 0), (3, 1), (3, 2)],
    ]
    assert nearest_masks((0, 1), (4, 1, 0)) == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(1, 0), (0, 2), (0, 3)],
        [(0, 2), (0, 3)],
    ]


def test_rows_are_used_as_long_as_they_pay() -> None:
    tree, rows = random_tree(3), np.arange(25.0)
    used = []
    for price in (0.0, 0.02, 0.1, 0.4, 2.0):
        step = best_step(tree, WORTH, 1 + price * rows, np.zeros(5), rate=1.0, room=100)
        used.append(len(step.nodes) + sum(step.mask_counts))
    assert used == sorted(used, reverse=True)
    assert used[0] == 23
    assert used[-1] == 0


def test_drafting_from_large_groups_has_its_price() -> None:
    tree = OfferedTree(np.zeros(0, int), np.zeros(0))
    groups = [
        best_step(tree, WORTH, np.ones(10), ms * np.arange(5.0), rate=1.0, room=100).mask_counts[0]
        for ms in (0.0, 0.15, 0.3, 0.5, 1.0)
    ]
    assert groups == [4, 3, 2, 1, 0]


def planner_of(rows: int, shares: tuple[float, ...] = SHARES) -> Any:
    curve = CostCurve(rows=(1,), contexts=(0,), forward_ms=((1.0,),), draft_ms=(0.0,))
    known = Speculation(LiveCosts(curve), Acceptance.from_shares(shares))
    return make_planner("tree", num_draft_tokens=4, speculation=known, max_rows=rows)


def plan(planner: Any, tree: OfferedTree | None, *, depth: int = 4, room: int = 100) -> Plan:
    offer = Offer(MASK, depth if tree else 0, tree=tree)
    return planner.plan(num_pending=1, room=room, offers=[offer], context=5)


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
def test_a_tree_without_siblings_is_a_chain_at_least_as_good_as_the_best(rows: int) -> None:
    shares = np.array([1.0, *SHARES])
    tree = OfferedTree(np.arange(4), shares[1:] / shares[:-1])
    policy = best_policy(shares, np.ones(rows + 1), np.zeros(5))
    action = policy.actions[4]
    found = plan(planner_of(rows), tree)
    assert not found.layout.is_tree
    assert found.nodes == tuple(range(1, found.layout.num_draft_tokens + 1))
    assert found.source == MASK
    step = best_step(
        tree, worth_by_lag(policy.values), np.ones(rows + 1), np.zeros(5), rate=1.0, room=100
    )
    chain = expected_tokens(shares, action.num_draft_tokens) + (1 - RESET_PROB) * float(
        accepted_probs(shares, action.num_draft_tokens) @ policy.values[list(action.mask_counts)]
    )
    assert step.value >= 0.99 * chain - 1.0


def test_likely_siblings_are_verified_and_unlikely_ones_are_not() -> None:
    parents = np.array([0, 0, 1, 2])
    likely = plan(planner_of(8), OfferedTree(parents, np.array([0.5, 0.45, 0.5, 0.5])), depth=2)
    assert {1, 2} <= set(likely.nodes or ())
    assert likely.layout.is_tree
    unlikely = plan(planner_of(8), OfferedTree(parents, np.array([0.9, 0.01, 0.9, 0.5])), depth=2)
    assert unlikely.nodes == (1, 3)
    assert not unlikely.layout.is_tree


def test_a_step_without_drafts_has_masks_within_the_rows() -> None:
    for rows in (1, 2, 3, 5, 9):
        layout = plan(planner_of(rows), None).layout
        assert layout.num_draft_tokens == 0
        assert min(rows, 3) <= layout.num_rows <= rows


def test_acceptance_follows_what_is_observed() -> None:
    known, rng = TreeAcceptance(), np.random.default_rng(0)
    drafted = np.array([0.05, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(known.probs(drafted), drafted)  # nothing observed yet
    true = np.array([0.103, 0.247, 0.38, 0.6])  # odds of half the power, and half
    for _ in range(1500):
        known.observe(drafted, rng.random(4) < true)
    np.testing.assert_allclose(known.probs(drafted), true, atol=0.06)
    between = known.probs(np.linspace(0.01, 0.99, 50))
    assert (np.diff(between) > 0).all()
    assert ((between > 0) & (between < 1)).all()


def test_certain_drafts_do_not_break_the_estimate() -> None:
    known = TreeAcceptance()
    for _ in range(50):
        known.observe(np.array([1.0, 0.0]), np.array([False, True]))
    probs = known.probs(np.array([1.0, 0.0]))
    assert 0 < probs[1] < probs[0] < 1
