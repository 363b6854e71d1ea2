"""The planner behind auto: what it knows, what it plans, when it tries again."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import GPU_GUESS, CostCurve, LiveCosts
from mlx_mtp.planning.lookup import LookupAcceptance, TextAcceptance
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import LOOKUP, MASK, Plan
from mlx_mtp.planning.policy import best_policy
from mlx_mtp.planning.settings import DEFAULTS

FLAT = CostCurve(rows=(1, 64), contexts=(0,), forward_ms=((10.0, 11.0),), draft_ms=(0.0, 0.2))
STEEP = CostCurve(rows=(1, 64), contexts=(0,), forward_ms=((10.0, 640.0),), draft_ms=(0.0, 0.2))


def planner(
    curve: CostCurve = FLAT, *, k: int = 4, prior: float = 0.6, **options: Any
) -> AutoPlanner:
    known = Speculation(LiveCosts(curve), Acceptance([prior] * k))
    return AutoPlanner(known, num_draft_tokens=k, **options)


def play(
    plans: AutoPlanner, *, chance: Any, steps: int, curve: CostCurve, seed: int = 0
) -> list[Plan]:
    """Decode with drafts that each hold with a chance, or by position, at the curve's costs."""
    rng = np.random.default_rng(seed)
    costs, waiting, context, made = LiveCosts(curve), 0, 100, []
    for _ in range(steps):
        decision = plans.plan(
            num_pending=1, offers=[Offer(MASK, waiting)], room=10**6, context=context
        )
        layout = decision.layout
        count = layout.num_draft_tokens
        holds = rng.uniform(size=count) < np.resize(chance, count)
        held = int(np.cumprod(holds).sum())
        size = max(layout.mask_counts)
        ms = costs.forward_ms(0)[layout.num_rows] + costs.draft_ms(size)[-1]
        plans.observe(decision, last_node=held, context=context, ms=ms)
        waiting = layout.mask_counts[held]
        context += held + 1
        made.append(decision)
    return made


class TestPlans:
    @given(
        k=st.integers(1, 8),
        pending=st.integers(1, 5),
        waiting=st.integers(0, 8),
        room=st.integers(1, 12),
        found=st.integers(0, 30),
        prior=st.floats(0, 1),
        steep=st.booleans(),
    )
    def test_keep_within_what_there_is(self, k, pending, waiting, room, found, prior, steep):
        plans = planner(STEEP if steep else FLAT, k=k, prior=prior)
        decision = plans.plan(
            num_pending=pending, room=room, offers=[Offer(MASK, waiting), looked_up(found, 5)]
        )
        layout = decision.layout
        assert layout.num_pending == pending
        most = found if decision.source == LOOKUP else min(waiting, k)
        assert layout.num_draft_tokens <= min(most, room - 1)
        assert bool(decision.source) == bool(layout.num_draft_tokens)
        assert max(layout.mask_counts) <= k
        for held, masks in enumerate(layout.mask_counts):  # drafts that could never be emitted
            assert masks <= max(room - held - 2, 0)

    def test_spend_rows_where_they_are_cheap_and_none_where_they_are_dear(self):
        generous = play(planner(FLAT), chance=0.6, steps=60, curve=FLAT)
        assert np.mean([each.layout.num_rows for each in generous[5:]]) > 8
        frugal = play(planner(STEEP), chance=0.6, steps=60, curve=STEEP)
        assert np.mean([each.layout.num_rows for each in frugal[5:]]) < 1.3

    def test_change_with_the_text(self):
        curve = dataclasses.replace(FLAT, forward_ms=((10.0, 60.0),))
        plans = planner(curve)
        good = play(plans, chance=0.9, steps=80, curve=curve)
        bad = play(plans, chance=0.02, steps=160, curve=curve)
        assert np.mean([each.layout.num_rows for each in good[-30:]]) > 4
        assert np.mean([each.layout.num_rows for each in bad[-30:]]) < 1.5

    @pytest.mark.parametrize("falling", [False, True])
    def test_long_blocks_are_learnt_by_position(self, falling: bool) -> None:
        """As of an adapter without figures of its own, whose blocks may have 16 tokens."""
        k, curve = 15, dataclasses.replace(FLAT, rows=(1, 256))
        chance = np.linspace(0.9, 0.5, k) if falling else np.full(k, 0.85)
        known = Speculation(LiveCosts(curve), Acceptance.unknown(k))
        made = play(AutoPlanner(known, num_draft_tokens=k), chance=chance, steps=500, curve=curve)
        error = np.abs(known.acceptance.draft_probs() - chance)
        assert error[:6].max() < 0.12 and error.mean() < 0.15
        probs = np.concatenate([[1.0], np.cumprod(chance)])
        costs = LiveCosts(curve)
        best = best_policy(probs, costs.forward_ms(0), costs.draft_ms(k))
        tokens = sum(probs[: plan.layout.num_draft_tokens + 1].sum() for plan in made[-200:])
        assert tokens / sum(plan.expected_ms for plan in made[-200:]) > 0.93 * best.rate
        assert max(plan.layout.num_draft_tokens for plan in made[-200:]) > 8

    def test_of_a_model_without_masks_are_plain(self):
        plans = planner(k=1)
        plans.num_draft_tokens = 0
        assert plans.plan(num_pending=1, offers=[Offer(MASK, 0)], room=9).layout.num_rows == 1


class TestPlainDecoding:
    def test_is_left_for_a_moment_after_longer_and_longer_pauses(self):
        made = play(planner(FLAT, prior=0.0), chance=0.0, steps=400, curve=STEEP)
        probes = [at for at, each in enumerate(made) if each.is_probe and each.layout.num_masks]
        gaps = np.diff(probes)
        assert probes[0] >= DEFAULTS.first_pause and len(probes) >= 3
        assert all(later > earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
        rows = sum(each.layout.num_rows for each in made)
        assert rows <= 1.06 * len(made)

    def test_ends_when_drafts_hold_again(self):
        curve = dataclasses.replace(FLAT, forward_ms=((10.0, 60.0),))
        plans = planner(curve)
        assert play(plans, chance=0.0, steps=100, curve=curve)[-1].layout.num_rows == 1
        again = play(plans, chance=0.95, steps=250, curve=curve)
        assert np.mean([each.layout.num_draft_tokens for each in again[-50:]]) > 2


def looked_up(count: int, match: int, text: TextAcceptance | None = None) -> Offer:
    """What lookup offers."""
    text = text or LookupAcceptance().in_text()
    return Offer(LOOKUP, count, text.prefix_probs(match, count))


class TestLookup:
    def test_is_taken_where_it_is_worth_more(self):
        plans, waiting = planner(FLAT, prior=0.3), Offer(MASK, 2)
        alone = plans.plan(num_pending=1, room=99, offers=[waiting])
        assert alone.source == MASK
        found = plans.plan(num_pending=1, room=99, offers=[waiting, looked_up(20, 12)])
        assert found.source == LOOKUP and found.layout.num_draft_tokens > 4

    def test_is_taken_once_its_ids_are_right(self):
        curve = dataclasses.replace(FLAT, forward_ms=((10.0, 390.0),))
        plans, text = planner(curve, prior=0.0), LookupAcceptance().in_text()
        assert not plans.plan(num_pending=1, room=99, offers=[looked_up(9, 2, text)]).source
        for _ in range(12):
            text.observe(2, 1, 1)
        assert plans.plan(num_pending=1, room=99, offers=[looked_up(9, 2, text)]).source == LOOKUP

    def test_is_learnt_anew_in_each_answer(self):
        """Edits hold in all their length; a chat that comes next begins with less trust."""
        general = LookupAcceptance()
        first = general.in_text()

        def expected(text: TextAcceptance) -> float:
            offers = [looked_up(24, 4, text)]
            return planner(FLAT).plan(num_pending=1, room=99, offers=offers).expected_tokens

        for _ in range(20):
            first.observe(4, 24, 24)
        fresh = expected(LookupAcceptance().in_text())
        assert fresh < expected(general.in_text()) < 0.8 * expected(first)

    def test_is_left_where_rows_are_dear_and_once_it_fails(self):
        plans = planner(STEEP)
        assert not plans.plan(num_pending=1, room=99, offers=[looked_up(9, 9)]).source
        plans, text = planner(FLAT, prior=0.0), LookupAcceptance().in_text()
        sizes = []
        for _ in range(200):
            decision = plans.plan(num_pending=1, room=99, offers=[looked_up(9, 9, text)])
            plans.observe(decision, last_node=0, context=9, ms=10.5)
            text.observe(9, 1, 0)
            sizes.append(decision.layout.num_draft_tokens)
        assert sizes[0] > 4 and sizes[-1] <= 2


class TestAcceptance:
    def test_converges_to_what_happens_and_follows_changes(self):
        known, rng = Acceptance([0.5] * 3), np.random.default_rng(1)
        for chance in (0.8, 0.2):
            for _ in range(400):
                holds = np.cumprod(rng.uniform(size=3) < chance).sum()
                known.observe(3, int(holds))
            assert known.draft_probs()[0] == pytest.approx(chance, abs=0.15)

    def test_drafts_behind_a_wrong_one_are_not_counted(self):
        known = Acceptance([0.5, 0.5, 0.5])
        known.observe(3, 0)
        below = 0.5 - known.draft_probs()  # the later ones by what the first lets fear alone
        assert below[0] > 1.2 * below[1] > 1.2**2 * below[2] > 0

    def test_from_shares(self):
        known = Acceptance.from_shares([0.6, 0.3, 0.0])
        assert known.prefix_probs(3) == pytest.approx([1, 0.6, 0.3, 0.0])
        assert len(known.prefix_probs(5)) == 6

    @pytest.mark.parametrize("prior", [[], [1.2], [-0.1], [float("nan")]])
    def test_chances_are_checked(self, prior):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Acceptance(prior)


class TestCosts:
    CURVE = CostCurve(
        rows=(1, 4, 8), contexts=(0, 1000), forward_ms=((10, 12, 11), (20, 22, 30)),
        draft_ms=(0.0, 1.0, 1.5),
    )  # fmt: skip

    def test_lie_between_what_was_measured_and_never_fall(self):
        at = self.CURVE.forward(500)
        assert at[0] == 0 and at[1] == 15 and at[4] == 17 and at[8] == 20.5
        assert list(self.CURVE.forward(0)[4:]) == [11] * 5  # 12 at 4 rows was disturbed
        assert self.CURVE.forward(10**6)[8] == 30

    def test_there_and_back(self):
        assert CostCurve.from_dict(self.CURVE.to_dict()) == self.CURVE

    def test_a_slower_machine_changes_nothing_but_one_row_number_does(self):
        live = LiveCosts(replace(GPU_GUESS, is_guess=False))
        before = live.forward_ms(0).copy()
        for _ in range(200):
            for rows in (1, 4, 8):
                live.observe(rows=rows, largest_group=0, context=0, ms=3 * before[rows])
        now = live.forward_ms(0)
        assert now[[4, 8]] / now[1] == pytest.approx(before[[4, 8]] / before[1], rel=0.01)
        for _ in range(200):
            live.observe(rows=1, largest_group=0, context=0, ms=3 * before[1])
            live.observe(rows=8, largest_group=0, context=0, ms=6 * before[8])
        now = live.forward_ms(0)
        assert now[8] / now[1] == pytest.approx(2 * before[8] / before[1], rel=0.1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rows": [2, 4, 8]}, "rows must ascend from 1"),
            ({"contexts": [5, 5]}, "contexts must ascend"),
            ({"forward_ms": [[1, 2, 3]]}, "2 contexts of 3 row numbers"),
            ({"forward_ms": [[1, 2, 3], [1, 2, float("inf")]]}, "finite"),
            ({"forward_ms": [[0, 2, 3], [1, 2, 3]]}, "forwards take time"),
            ({"draft_ms": [1.0]}, "drafting from no masks takes none"),
            ({"rows": None}, "not a cost curve"),
        ],
    )
    def test_damaged_curves_are_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            CostCurve.from_dict(self.CURVE.to_dict() | change)
