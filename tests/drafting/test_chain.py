"""Chains: looked-up ids after the drafts of mask tokens, in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.options import PricedOffer, Prices, chain_option
from mlx_mtp.planning.plan import CHAIN, MASK, Plan
from mlx_mtp.planning.policy import RESET_PROB, accepted_probs, best_policy
from tests.helpers.scripted import ScriptedModel, mixed, right
from tests.helpers.tiny import tiny_mtp

PROMPT = [3, 1, 4, 1, 5]
K = 3


class ChainPlanner:
    """Takes every chain that is offered; otherwise verifies all waiting drafts."""

    def plan(self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), **_: Any) -> Plan:
        counts = {offer.source: offer.num_drafts for offer in offers}
        waiting, found = min(counts[MASK], room - 1), counts[CHAIN]
        if num_pending > 1:
            return Plan(StepLayout(num_pending, 0, (K,)))
        if not found or waiting < counts[MASK]:
            layout = StepLayout(1, waiting, (K,) * (waiting + 1))
            return Plan(layout, source=MASK if waiting else "")
        masks = (K,) * (waiting + 1) + (0,) * (found - 1) + (K,)
        layout = StepLayout(1, waiting + found, masks)
        return Plan(layout, source=CHAIN, num_first=waiting)

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


def run(model: Any, **options: Any) -> list[StepResult]:
    return list(decode(model, PROMPT, max_tokens=40, **options))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_chains_change_nothing_but_the_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mtp(kind, k=K)
    plain = [token for step in run(model, layout="plain") for token in step.tokens]
    copy = [token if index % 9 else (token + 1) % 64 for index, token in enumerate(plain, 1)]
    monkeypatch.setattr("mlx_mtp.decoding.setup.make_planner", lambda *_, **__: ChainPlanner())
    for script in (right([*PROMPT, *plain]), mixed([*PROMPT, *plain], seed=1)):
        steps = run(ScriptedModel(model, script), lookup_ids=[[*PROMPT, *copy]])
        assert [token for step in steps for token in step.tokens] == plain
        chains = [step for step in steps if step.source == CHAIN]
        assert any(step.num_accepted > dict(step.parts)[MASK] for step in chains)
        assert len(steps) < 20


def test_drafts_of_two_kinds_are_joined_without_a_change_of_their_distributions() -> None:
    drawn = Drafts(mx.array([7, 2]), mx.array([[7, 1], [5, 2]]), mx.array([[0.9, 0.1], [0.4, 0.6]]))
    joined = Drafts.joined([drawn, Drafts.certain(mx.array([4], mx.int32))])
    assert joined.tokens.tolist() == [7, 2, 4]
    dense = np.zeros((3, 8))
    for row in range(3):
        np.add.at(dense[row], np.array(joined.candidates[row]), np.array(joined.probs[row]))
    assert np.allclose(dense[0, [7, 1]], [0.9, 0.1])
    assert np.allclose(dense[1, [5, 2]], [0.4, 0.6])
    assert dense[2, 4] == 1 and np.allclose(dense.sum(axis=1), 1)


@given(
    accepted=st.lists(st.floats(0.1, 0.95), min_size=2, max_size=4),
    found=st.lists(st.floats(0.1, 0.99), min_size=1, max_size=6),
    slope=st.floats(0.01, 1.0),
)
def test_a_chain_is_worth_what_its_outcomes_are_worth(
    accepted: list[float], found: list[float], slope: float
) -> None:
    """Against the sum over all numbers of accepted drafts."""
    mask_probs = np.concatenate([[1.0], np.cumprod(accepted)])
    k = len(accepted)
    forward_ms = np.concatenate([[0.0], 10 + slope * np.arange(40)])
    mask_ms = np.full(k + 1, 0.3)
    mask_ms[0] = 0.0
    policy = best_policy(mask_probs, forward_ms, mask_ms)
    prices = Prices(policy, forward_ms, mask_ms, policy.rate)
    priced = PricedOffer(
        Offer(CHAIN, len(found), follows=k),
        np.concatenate([[1.0], np.cumprod(found)]),
        np.zeros(len(found) + 1),
    )
    option = chain_option(priced, prices, mask_probs, k)
    action = policy.actions[k]
    if action.num_draft_tokens < k:
        assert option is None
        return
    assert option is not None and option.num_first == k

    def value(added: int) -> float:
        probs = np.concatenate([mask_probs[:-1], mask_probs[-1] * priced.prefix_probs])
        outcomes = accepted_probs(probs, k + added)
        counts = (*action.mask_counts, *(0,) * added)
        later = (1 - RESET_PROB) * sum(
            chance * policy.values[count] for chance, count in zip(outcomes, counts, strict=True)
        )
        ms = forward_ms[action.num_rows + added] + mask_ms[max(counts)]
        return float(probs[: k + added + 1].sum() + later - policy.rate * ms)

    values = [value(added) for added in range(1, len(found) + 1)]
    assert option.value == pytest.approx(max(values), abs=1e-6)
    assert option.action.num_draft_tokens == k + 1 + int(np.argmax(values))
