"""Several drafters at once: plans that keep to what is offered, and what a wrong one may cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import CHAIN, DRAFT_MODEL, HEADS, LOOKUP, MASK, NATIVE
from tests.helpers.simulated import CURVE

TOKENS = 64  # of an answer
SLOW_ROWS = CostCurve(
    rows=(1, 4, 8, 16, 30), contexts=(0,), forward_ms=((10, 14, 20, 33, 58),), draft_ms=(0.0, 0.5)
)


@dataclass
class Simulated:
    """A drafter of a simulated machine.

    Attributes:
        source: its name.
        chance: probability that a draft is accepted if those before it are.
        cost: plain steps that a draft takes to propose.
        prior: what it says that it takes; the same by default.
        first_cost: plain steps of the first draft; those of the others by default.
        count: drafts that it offers.
    """

    source: str
    chance: float
    cost: float
    prior: float | None = None
    count: int = 8

    def offer(self, room: int) -> Offer:
        prior = self.cost if self.prior is None else self.prior
        return Offer(self.source, min(self.count, room), first_cost=prior, next_cost=prior)


class Machine:
    """Answers of simulated drafters at the costs of a curve.

    Attributes:
        known: what the planner knows.
        used: drafts verified by source.
    """

    def __init__(self, curve: CostCurve = CURVE, *, noise: float = 0.0, seed: int = 0) -> None:
        self.known = Speculation(LiveCosts(curve), Acceptance.unknown(0))
        self.used: dict[str, int] = {}
        self._curve, self._noise = curve, noise
        self._rng = np.random.default_rng(seed)

    def speed(self, drafters: Sequence[Simulated], answers: int) -> float:
        """Speed of so many answers over that of plain decoding."""
        plain = spent = 0.0
        for _ in range(answers):
            planner, room = AutoPlanner(self.known, num_draft_tokens=0), TOKENS
            while room:
                plan = planner.plan(
                    num_pending=1, room=room, context=TOKENS - room,
                    offers=[drafter.offer(room - 1) for drafter in drafters],
                )  # fmt: skip
                count, times = plan.layout.num_draft_tokens, self._curve.forward(TOKENS - room)
                ms, accepted = float(times[plan.layout.num_rows]), 0
                if count:
                    [drafter] = [each for each in drafters if each.source == plan.source]
                    ms += drafter.cost * count * float(times[1])
                    right = self._rng.random(count) < drafter.chance
                    accepted = int(np.cumprod(right).sum())
                    self.used[plan.source] = self.used.get(plan.source, 0) + count
                ms *= math.exp(self._noise * self._rng.standard_normal())
                planner.observe(plan, last_node=accepted, context=TOKENS - room, ms=ms)
                spent += ms
                plain += float(times[1]) * (accepted + 1)
                room -= accepted + 1
        return plain / spent


@given(
    counts=st.lists(st.integers(0, 12), min_size=5, max_size=5),
    follows=st.integers(0, 4),
    room=st.integers(1, 20),
    pending=st.sampled_from([1, 1, 1, 7]),
    sharers=st.sampled_from([1, 3]),
    chance=st.floats(0, 1),
    cost=st.floats(0, 2),
    seed=st.integers(0, 99),
)
def test_no_more_is_verified_than_offered_or_than_there_is_room_for(
    counts: list[int], follows: int, room: int, pending: int, sharers: int, chance: float,
    cost: float, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    known = Speculation(LiveCosts(CURVE), Acceptance([chance] * 4), sharers=sharers)
    planner = AutoPlanner(known, num_draft_tokens=4)
    waiting = min(follows, room - 1)
    offers = [Offer(MASK, waiting)]
    for source, count in zip((NATIVE, HEADS, DRAFT_MODEL), counts, strict=False):
        offers.append(Offer(source, min(count, room - 1), first_cost=cost, next_cost=cost / 2))
    probs = np.cumprod([1.0, *rng.uniform(chance, 1, 12)])
    offers.append(Offer(LOOKUP, min(counts[3], room - 1), probs[: min(counts[3], room - 1) + 1]))
    after = max(min(counts[4], room - 1 - waiting), 0) if waiting else 0
    offers.append(Offer(CHAIN, after, probs[: after + 1], follows=waiting))
    most = {each.source: each.num_drafts + each.follows for each in offers}
    for _ in range(40):
        plan = planner.plan(num_pending=pending, room=room, offers=offers, context=50)
        count = plan.layout.num_draft_tokens
        assert count <= room - 1 and plan.layout.num_pending == pending
        assert bool(count) == bool(plan.source)
        if count:
            assert count <= most[plan.source]
            assert sum(number for _, number in plan.parts) == count
            assert plan.source != CHAIN or plan.num_first == waiting < count
        accepted = int(rng.integers(0, count + 1))
        planner.observe(plan, last_node=accepted, context=50, ms=rng.uniform(5, 60))


@pytest.mark.parametrize("cost", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("curve", [CURVE, SLOW_ROWS], ids=["fast rows", "slow rows"])
def test_drafters_that_are_always_wrong_cost_little(curve: CostCurve, cost: float) -> None:
    machine = Machine(curve)
    drafters = [Simulated(NATIVE, 0.0, cost), Simulated(DRAFT_MODEL, 0.0, cost)]
    assert machine.speed(drafters[:1], 200) >= 0.97
    assert machine.speed(drafters, 200) >= 0.97
    assert min(machine.used.values()) > 0  # they were tried
    assert machine.speed(drafters, 100) >= 0.985  # from then on


def test_a_drafter_that_becomes_good_is_found_again() -> None:
    machine = Machine()
    wrong, good = Simulated(NATIVE, 0.0, 0.1), Simulated(NATIVE, 0.9, 0.1)
    machine.speed([wrong], 100)
    machine.speed([good], 50)
    late = machine.speed([good], 20)
    at_once = Machine()
    at_once.speed([good], 50)
    assert late >= 0.97 * at_once.speed([good], 20) > 1.5


def test_the_better_of_two_is_taken_and_changes_with_them() -> None:
    machine = Machine()
    first = [Simulated(NATIVE, 0.85, 0.1), Simulated(DRAFT_MODEL, 0.5, 0.2)]
    machine.speed(first, 40)
    assert machine.used[NATIVE] > 5 * machine.used.get(DRAFT_MODEL, 0)
    second = [Simulated(NATIVE, 0.2, 0.1), Simulated(DRAFT_MODEL, 0.9, 0.2)]
    machine.speed(second, 80)
    machine.used.clear()
    machine.speed(second, 20)
    assert machine.used[DRAFT_MODEL] > 5 * machine.used.get(NATIVE, 0)


@pytest.mark.parametrize("chance", [0.45, 0.6, 0.8])
def test_costs_of_proposing_are_learned(chance: float) -> None:
    """Five times the prior, or a fifth of it: later as fast as with the right prior."""
    for cost, prior in ((0.5, 0.1), (0.06, 0.3)):
        speeds = []
        for told in (prior, cost):
            machine = Machine()
            drafters = [Simulated(NATIVE, chance, cost, prior=told)]
            assert machine.speed(drafters, 60) >= 0.97
            speeds.append(machine.speed(drafters, 40))
        assert speeds[0] >= 0.96 * speeds[1]


@given(
    chances=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    costs=st.lists(st.floats(0.1, 0.5), min_size=3, max_size=3),
    wrong=st.floats(0.2, 5),
    noise=st.sampled_from([0.0, 0.05, 0.2]),
    curve=st.sampled_from([CURVE, SLOW_ROWS]),
    seed=st.integers(0, 10**6),
)
def test_it_is_hardly_ever_slower_than_plain(
    chances: list[float], costs: list[float], wrong: float, noise: float, curve: CostCurve,
    seed: int,
) -> None:  # fmt: skip
    sources = (NATIVE, HEADS, DRAFT_MODEL)
    drafters = [
        Simulated(source, chance, cost, prior=cost / wrong)
        for source, chance, cost in zip(sources, chances, costs, strict=True)
    ]
    assert Machine(curve, noise=noise, seed=seed).speed(drafters, 60) >= 0.97 * math.exp(
        -(noise**2)
    )
