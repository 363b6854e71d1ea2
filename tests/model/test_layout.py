"""Rows of a step: counts, positions and visibility against a row-by-row definition; the planner."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.model.layout import (
    MaskRun,
    StepLayout,
    StepScope,
    linear_layout,
    plain_layout,
    quadratic_layout,
    subtree_parents,
)
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import FIXED_LAYOUTS, MASK


def drawn_parents(num_drafts: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """Parents of a tree of drafts, or None for a chain."""
    return st.none() | st.tuples(*(st.integers(0, index) for index in range(num_drafts)))


layouts = st.lists(st.integers(0, 4), min_size=1, max_size=7).flatmap(
    lambda counts: st.builds(
        StepLayout,
        st.integers(1, 4),
        st.just(len(counts) - 1),
        st.just(tuple(counts)),
        drawn_parents(len(counts) - 1),
    )
)


def way_to(layout: StepLayout, node: int) -> list[int]:
    """A draft and those before it back to the last pending row, the last first."""
    if node == 0:
        return []
    parent = node - 1 if layout.parents is None else layout.parents[node - 1]
    return [node, *way_to(layout, parent)]


def rows_of(layout: StepLayout) -> list[tuple[str, int, int]]:
    """Every row in words: ("pending", place, 0), ("draft", number, 0) or ("mask", group, place)."""
    ordinary = [("pending", place, 0) for place in range(layout.num_pending)]
    ordinary += [("draft", 1 + draft, 0) for draft in range(layout.num_draft_tokens)]
    masks = [
        ("mask", group, place)
        for group, count in enumerate(layout.mask_counts)
        for place in range(count)
    ]
    return ordinary + masks


def may_see(layout: StepLayout, row: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
    """Whether a row may see another one of its step (or itself), by the rule in words."""
    kind, group, place = row
    other_kind, other_group, other_place = other
    if kind == "pending":
        return other_kind == "pending" and other_group <= group
    if other_kind == "pending":
        return True
    if other_kind == "draft":
        return other_group in way_to(layout, group)
    return kind == "mask" and group == other_group and other_place <= place


@given(layouts)
def test_rows_stand_and_see_as_the_rule_says(layout: StepLayout) -> None:
    rows = rows_of(layout)
    assert layout.num_rows == len(rows)
    assert layout.num_masks == sum(kind == "mask" for kind, _, _ in rows)
    assert layout.gate_split == layout.num_ordinary == len(rows) - layout.num_masks
    positions = [
        first if kind == "pending" else layout.num_pending + len(way_to(layout, first)) + place
        for kind, first, place in rows
    ]
    positions = [
        position - (kind == "draft") for position, (kind, *_) in zip(positions, rows, strict=True)
    ]
    assert layout.positions.tolist() == positions
    assert layout.mask_offsets.tolist() == [place for kind, _, place in rows if kind == "mask"]
    sees = [[may_see(layout, row, other) for other in rows] for row in rows]
    assert np.array(layout.attention).tolist() == sees


@given(layouts)
def test_what_a_row_sees_stands_before_it_without_a_gap(layout: StepLayout) -> None:
    positions = np.array(layout.positions)
    for row, sees in enumerate(np.array(layout.attention)):
        assert sorted(positions[sees].tolist()) == list(range(positions[row] + 1))


@given(layouts)
def test_group_rows_point_at_each_group(layout: StepLayout) -> None:
    rows = rows_of(layout)
    table = np.array(layout.group_rows)
    assert table.shape == (layout.num_draft_tokens + 1, max(layout.mask_counts))
    assert ((table >= 0) & (table < layout.num_rows)).all()
    for group, count in enumerate(layout.mask_counts):
        found = [rows[row] for row in table[group, :count]]
        assert found == [("mask", group, place) for place in range(count)]


@given(layouts)
def test_paths_are_the_drafts_on_the_way_and_their_rows_the_kept_ones(layout: StepLayout) -> None:
    rows = rows_of(layout)
    for node in range(layout.num_draft_tokens + 1):
        way = way_to(layout, node)[::-1]
        assert layout.path(node) == tuple(way)
        assert layout.depths[node] == len(way)
        kept = [rows[row] for row in layout.rows_to(node)]
        pending = [("pending", place, 0) for place in range(layout.num_pending)]
        assert kept == [*pending, *(("draft", each, 0) for each in way)]


def test_a_chain_that_is_spelled_out_is_the_chain() -> None:
    spelled = StepLayout(2, 3, (0, 1, 0, 2), (0, 1, 2))
    assert spelled == StepLayout(2, 3, (0, 1, 0, 2)) and not spelled.is_tree
    assert hash(spelled) == hash(StepLayout(2, 3, (0, 1, 0, 2)))
    assert not StepLayout(1, 1, (0, 0), (0,)).is_tree
    branched = StepLayout(2, 3, (0, 1, 0, 2), (0, 1, 1))
    assert branched.is_tree and branched != spelled
    assert spelled.depths.tolist() == [0, 1, 2, 3] and branched.depths.tolist() == [0, 1, 2, 2]
    assert StepLayout(1, 2, (0, 0, 0)).is_contiguous
    assert not StepLayout(1, 2, (0, 0, 0), (0, 0)).is_contiguous


@pytest.mark.parametrize("parents", [(0,), (0, 1, 2), (1, 0), (0, 2), (-1, 0)])
def test_a_parent_must_come_before_its_children(parents: Any) -> None:
    with pytest.raises(ValueError, match="earlier parent for each of 2"):
        StepLayout(1, 2, (0, 0, 0), parents)


def test_the_parents_of_some_nodes_are_counted_among_them() -> None:
    parents = (0, 0, 1, 2, 2, 5)  # 1 and 2; 3 after 1; 4 and 5 after 2; 6 after 5
    assert subtree_parents(parents, range(1, 7)) == parents
    assert subtree_parents(parents, (2, 5, 6)) == (0, 1, 2)
    assert subtree_parents(np.array(parents), (1, 2, 3, 5)) == (0, 0, 1, 2)
    with pytest.raises(KeyError):
        subtree_parents(parents, (3,))


@pytest.mark.parametrize(
    ("pending", "drafts", "counts"),
    [(0, 0, (1,)), (1, -1, ()), (1, 1, (1,)), (1, 1, (1, 1, 1)), (1, 1, (1, -1))],
)
def test_impossible_layouts_are_refused(pending: int, drafts: int, counts: Any) -> None:
    with pytest.raises(ValueError, match="a step needs"):
        StepLayout(pending, drafts, counts)


def test_the_papers_layouts() -> None:
    assert plain_layout(num_pending=3) == StepLayout(3, 0, (0,))
    linear = linear_layout(num_pending=1, num_draft_tokens=3, num_masks=2)
    assert linear.mask_counts == (0, 0, 0, 2)
    quadratic = quadratic_layout(num_pending=1, num_draft_tokens=8, num_masks=8)
    assert quadratic.num_rows == 81  # (k + 1)^2
    assert linear_layout(num_pending=1, num_draft_tokens=8, num_masks=8).num_rows == 17  # 2 k + 1


def test_a_scope_knows_a_step_only_if_some_row_does_not_see_all_before() -> None:
    scope = StepScope()
    assert scope.step is None
    scope.layout = plain_layout()
    assert scope.step is None
    scope.layout = StepLayout(1, 2, (0, 0, 2))  # masks after the last row see all before
    assert scope.step is None
    scope.layout = layout = StepLayout(1, 1, (1, 0))
    assert scope.step is layout
    scope.layout = StepLayout(1, 2, (0, 0, 0))
    assert scope.step is None
    scope.layout = layout = StepLayout(1, 2, (0, 0, 0), (0, 0))
    assert scope.step is layout
    scope.layout = MaskRun(2)
    assert scope.step is None


@given(
    name=st.sampled_from(FIXED_LAYOUTS),
    k=st.integers(0, 8),
    pending=st.integers(1, 5),
    waiting=st.integers(0, 8),
    room=st.integers(1, 12),
)
def test_a_plan_verifies_no_more_than_there_is_and_can_be_emitted(
    name: str, k: int, pending: int, waiting: int, room: int
) -> None:
    planner = FixedPlanner(name, num_draft_tokens=k, max_drafts=k)
    layout = planner.plan(num_pending=pending, offers=[Offer(MASK, waiting)], room=room).layout
    assert layout.num_pending == pending
    assert layout.num_draft_tokens <= min(waiting, k, room - 1)
    assert max(layout.mask_counts) <= k
    if name == "plain" or k == 0:
        assert layout == plain_layout(num_pending=pending)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'cubic'"):
        FixedPlanner("cubic", num_draft_tokens=2)


def test_masks_after_the_last_row_are_contiguous() -> None:
    assert StepLayout(2, 2, (0, 0, 3)).is_contiguous and plain_layout().is_contiguous
    assert not StepLayout(1, 1, (1, 0)).is_contiguous
    assert not StepLayout(1, 2, (0, 0, 0), parents=(0, 0)).is_contiguous
    for layout in (StepLayout(2, 2, (0, 0, 3)), StepLayout(1, 2, (1, 0, 2))):
        steps = np.diff(np.array(layout.positions))
        assert layout.is_contiguous == (steps == 1).all()


def test_the_layers_of_a_forward_share_their_positions() -> None:
    scope, layout = StepScope(), StepLayout(1, 1, (1, 1))
    scope.layout = layout
    rows = scope.positions_from(5)
    assert scope.positions_from(5) is rows and rows.tolist() == [5, 6, 6, 7]
    assert scope.positions_from(6).tolist() == [6, 7, 7, 8]
    scope.layout = StepLayout(1, 0, (2,))
    assert scope.positions_from(6).tolist() == [6, 7, 8]
    assert scope.positions_from(mx.array([4])).tolist() == [4, 5, 6]
