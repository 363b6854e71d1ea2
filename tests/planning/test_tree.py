"""Steps with trees: what is verified, where masks go, and what the planner knows of nodes."""

from __future__ import annotations

from itertools import combinations
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
from mlx_mtp.planning.policy import RESET_PROB, best_policy
from mlx_mtp.planning.tree import TreeStep, best_step
from mlx_mtp.planning.tree_acceptance import TreeAcceptance

VALUES = np.array([0.0, 0.6, 1.0, 1.2, 1.3])
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
    return best_step(tree, VALUES, np.ones(rows + 1), np.zeros(len(VALUES)), **options)


def worth(tree: OfferedTree, nodes: tuple[int, ...], masks: tuple[int, ...]) -> float:
    """The value of a step by the formula, one node at a time."""
    reach = [1.0]
    for prob, parent in zip(tree.probs, tree.parents, strict=True):
        reach.append(float(prob) * reach[parent])
    value = 1.0
    for node, count in zip((0, *nodes), masks, strict=True):
        children = sum(reach[each] for each in nodes if tree.parents[each - 1] == node)
        value += (reach[node] if node else 0.0) + (
            (1 - RESET_PROB) * (reach[node] - children) * VALUES[count]
        )
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
    assert step.value == pytest.approx(worth(tree, step.nodes, step.mask_counts))
    assert step_of(tree, rows + 1, room=room).value >= step.value - 1e-9


def exhaustive(tree: OfferedTree, rows: int) -> float:
    """The value of the best of all steps of up to so many rows."""
    all_nodes, best = range(1, len(tree.probs) + 1), 0.0
    for count in range(min(rows, len(tree.probs) + 1)):
        for nodes in combinations(all_nodes, count):
            if not is_closed(tree, nodes):
                continue
            masks = [0] * (count + 1)
            for _ in range(rows - 1 - count):  # each term is concave, so one by one is the best
                gains = [
                    worth(tree, nodes, (*masks[:i], masks[i] + 1, *masks[i + 1 :]))
                    if masks[i] + 1 < len(VALUES)
                    else 0.0
                    for i in range(count + 1)
                ]
                if max(gains) > worth(tree, nodes, tuple(masks)):
                    masks[int(np.argmax(gains))] += 1
            best = max(best, worth(tree, nodes, tuple(masks)))
    return best


def test_steps_are_nearly_the_best_of_all() -> None:
    found, best = [], []
    for seed in range(12):
        tree = random_tree(seed, width=2, depth=3)
        for rows in (3, 6, 9):
            found.append(step_of(tree, rows).value)
            best.append(exhaustive(tree, rows))
    assert all(f <= b + 1e-9 for f, b in zip(found, best, strict=True))
    assert np.mean(found) > 0.99 * np.mean(best)


def test_rows_are_used_as_long_as_they_pay() -> None:
    tree, rows = random_tree(3), np.arange(25.0)
    used = []
    for price in (0.0, 0.02, 0.1, 0.4, 2.0):
        step = best_step(tree, VALUES, 1 + price * rows, np.zeros(5), rate=1.0, room=100)
        used.append(len(step.nodes) + sum(step.mask_counts))
    assert used == sorted(used, reverse=True)
    assert used[0] == 23
    assert used[-1] == 0


def test_drafting_from_large_groups_has_its_price() -> None:
    tree = OfferedTree(np.zeros(0, int), np.zeros(0))
    groups = [
        best_step(tree, VALUES, np.ones(10), ms * np.arange(5.0), rate=1.0, room=100).mask_counts[0]
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
def test_a_tree_without_siblings_is_the_best_chain(rows: int) -> None:
    shares = np.array([1.0, *SHARES])
    tree = OfferedTree(np.arange(4), shares[1:] / shares[:-1])
    action = best_policy(shares, np.ones(rows + 1), np.zeros(5)).actions[4]
    found = plan(planner_of(rows), tree)
    assert found.layout == StepLayout(1, action.num_draft_tokens, action.mask_counts)
    assert found.nodes == tuple(range(1, action.num_draft_tokens + 1))
    assert found.source == MASK


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
