"""Fixed policies, many at once: NumPy replays a trace with all of them together, step by step.

A fixed policy never changes; it has an action for each number of waiting drafts.  ``PolicyPlanner``
follows one policy as a planner of the decoder; ``replay_policies`` gives the same times for
hundreds of policies in the time of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import MASK, Plan
from mlx_mtp.planning.policy import Action
from mlx_mtp.simulate.replay import CONTEXT_STEP, StepCosts
from mlx_mtp.simulate.trace import Trace

Actions = tuple[Action, ...]  # by the number of waiting drafts, [k + 1]


class PolicyPlanner:
    """Follows one policy, without drafts and masks that could never be emitted."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    def plan(self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), **_: Any) -> Plan:
        """Plan one step."""
        num_waiting = sum(offer.num_drafts for offer in offers)
        max_room = 2 * len(self._actions)
        return _plan(self._actions, num_pending, min(num_waiting, room - 1), min(room, max_room))

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


@lru_cache(maxsize=4096)
def _plan(actions: Actions, num_pending: int, num_waiting: int, room: int) -> Plan:
    action = actions[num_waiting]
    drafts = action.num_draft_tokens
    masks = tuple(max(0, min(c, room - 2 - a)) for a, c in enumerate(action.mask_counts))
    return Plan(StepLayout(num_pending, drafts, masks), source=MASK if drafts else "")


def fixed_policies(num_draft_tokens: int, max_rows: int) -> Iterator[tuple[str, Actions]]:
    """Policies of one shape: at most d drafts, and c masks after each of them or the last one."""
    k = num_draft_tokens
    for drafts in range(k + 1):
        for masks in range(k + 1):
            for where in ("each", "the last")[: 2 if drafts and masks else 1]:
                inner = masks if where == "each" else 0
                counts = [min(drafts, waiting) for waiting in range(k + 1)]
                actions = tuple(Action(d, (inner,) * d + (masks,)) for d in counts)
                if max(action.num_rows for action in actions) <= max_rows:
                    yield f"{drafts} drafts, {masks} masks after {where}", actions


def replay_policies(trace: Trace, policies: Sequence[Actions], costs: StepCosts) -> np.ndarray:
    """Milliseconds after the first steps of each policy on a trace, ``[policies]``.

    Args:
        trace: the accepted drafts.
        policies: actions for the k of the trace.
        costs: durations of steps.
    """
    tables = _Tables(policies, trace.num_draft_tokens)
    longest = max(len(answer.counts) for answer in trace.answers)
    counts = np.zeros((len(trace.answers), longest + 1), dtype=int)
    for row, traced in zip(counts, trace.answers, strict=True):
        row[: len(traced.counts)] = traced.counts
    ends = np.array([answer.num_tokens for answer in trace.answers])
    prompts = np.array([answer.prompt for answer in trace.answers])
    deepest = int((prompts + ends).max()) // CONTEXT_STEP
    contexts = [index * CONTEXT_STEP for index in range(deepest + 1)]
    forward = np.array([costs.forward_ms(context) for context in contexts])
    drafting = np.array([costs.draft_ms(size) for size in range(trace.num_draft_tokens + 1)])
    policy, answer = np.indices((len(policies), len(ends))).reshape(2, -1)
    zeros = np.zeros_like(policy)
    _, _, emitted, waiting = tables.step(policy, zeros, zeros, trace.max_tokens)
    total = np.zeros(len(policies))
    while True:
        is_running = emitted < ends[answer]
        policy, answer = policy[is_running], answer[is_running]
        emitted, waiting = emitted[is_running], waiting[is_running]
        if not len(policy):
            return total
        room = trace.max_tokens - emitted
        drafts = tables.drafts[policy, np.minimum(waiting, room - 1)]
        accepted = np.minimum(drafts, counts[answer, emitted - 1])
        rows, largest, tokens, next_waiting = tables.step(policy, waiting, accepted, room)
        context = (prompts[answer] + emitted - 1) // CONTEXT_STEP
        np.add.at(total, policy, forward[context, rows] + drafting[largest])
        emitted, waiting = emitted + tokens, next_waiting


class _Tables:
    """Policies as arrays.

    Attributes:
        drafts: drafts to verify, ``[policies, waiting]``.
        masks: masks after the pending token and after each draft, ``[policies, waiting, k + 1]``; 0
            after drafts that are not verified.
    """

    def __init__(self, policies: Sequence[Actions], k: int) -> None:
        self.drafts = np.array([[a.num_draft_tokens for a in actions] for actions in policies])
        self.masks = np.zeros((len(policies), k + 1, k + 1), dtype=int)
        for index, actions in enumerate(policies):
            for waiting, action in enumerate(actions):
                self.masks[index, waiting, : len(action.mask_counts)] = action.mask_counts
        self._max_room = 2 * (k + 1)
        rooms = np.arange(self._max_room + 1)[:, None, None, None]
        useful = np.clip(self.masks, 0, np.maximum(rooms - 2 - np.arange(k + 1), 0))
        self._rows = 1 + self.drafts + useful.sum(-1)  # [room, policies, waiting]
        self._largest = useful.max(-1)

    def step(
        self, policy: np.ndarray, waiting: np.ndarray, accepted: np.ndarray, room: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows, largest mask group, emitted tokens and drafts that wait next, each ``[steps]``."""
        waiting = np.minimum(waiting, room - 1)
        index = np.minimum(room, self._max_room), policy, waiting
        next_waiting = np.minimum(
            self.masks[policy, waiting, accepted], np.maximum(room - 2 - accepted, 0)
        )
        return self._rows[index], self._largest[index], accepted + 1, next_waiting
