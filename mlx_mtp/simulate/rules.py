"""Fixed rules, many at once: replayed on a trace by NumPy, step by step for all of them together.

A rule says for each number of waiting drafts how many are verified and where masks go; it never
changes.  ``RulePlanner`` follows one as the decoder's planners do; ``replay_rules`` gives the same
times for hundreds of them in the time that one takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.plan import MASK, Plan
from mlx_mtp.planning.policy import Action
from mlx_mtp.simulate.replay import CONTEXT_STEP, StepCosts
from mlx_mtp.simulate.trace import Trace

Rule = tuple[Action, ...]  # by the number of waiting drafts, [k + 1]


class RulePlanner:
    """Follows one rule; drafts and masks that could never be emitted are left out."""

    uses_lookup = False

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def plan(self, *, num_pending: int, num_waiting: int, room: int, **_: Any) -> Plan:
        """Plan one step."""
        enough = 2 * len(self._rule)
        return _decision(self._rule, num_pending, min(num_waiting, room - 1), min(room, enough))

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


@lru_cache(maxsize=4096)
def _decision(rule: Rule, num_pending: int, waiting: int, room: int) -> Plan:
    plan = rule[waiting]
    useful = tuple(max(0, min(c, room - 2 - at)) for at, c in enumerate(plan.mask_counts))
    drafts = plan.num_draft_tokens
    return Plan(StepLayout(num_pending, drafts, useful), source=MASK if drafts else "")


def fixed_rules(num_draft_tokens: int, most_rows: int) -> Iterator[tuple[str, Rule]]:
    """Rules of one shape: at most d drafts, and c masks behind each place or behind the last."""
    k = num_draft_tokens
    for drafts in range(k + 1):
        for masks in range(k + 1):
            for where in ("each", "the last")[: 2 if drafts and masks else 1]:
                rule = tuple(
                    _shape(min(drafts, waiting), masks, where == "each") for waiting in range(k + 1)
                )
                if max(plan.num_rows for plan in rule) <= most_rows:
                    yield f"{drafts} drafts, {masks} masks behind {where}", rule


def _shape(drafts: int, masks: int, everywhere: bool) -> Action:
    return Action(drafts, (masks if everywhere else 0,) * drafts + (masks,))


def replay_rules(trace: Trace, rules: Sequence[Rule], costs: StepCosts) -> np.ndarray:
    """Milliseconds behind the first steps that each rule takes for a trace, ``[rules]``.

    Args:
        trace: the drafts that hold.
        rules: for the trace's k.
        costs: what steps take.
    """
    tables = _Tables(rules, trace.num_draft_tokens)
    longest = max(len(each.counts) for each in trace.answers)
    counts = np.zeros((len(trace.answers), longest + 1), dtype=int)
    for at, each in enumerate(trace.answers):
        counts[at, : len(each.counts)] = each.counts
    ends = np.array([each.num_tokens for each in trace.answers])
    prompts = np.array([each.prompt for each in trace.answers])
    deepest = int((prompts + ends).max()) // CONTEXT_STEP
    forward = np.array([costs.forward_ms(at * CONTEXT_STEP) for at in range(deepest + 1)])
    drafting = np.array([costs.draft_ms(size) for size in range(trace.num_draft_tokens + 1)])
    which, answer = np.indices((len(rules), len(ends))).reshape(2, -1)
    _, _, emitted, waiting = tables.step(
        which, np.zeros_like(which), np.zeros_like(which), trace.max_tokens
    )
    total = np.zeros(len(rules))
    while True:
        goes_on = emitted < ends[answer]
        which, answer = which[goes_on], answer[goes_on]
        emitted, waiting = emitted[goes_on], waiting[goes_on]
        if not len(which):
            return total
        room = trace.max_tokens - emitted
        drafts = tables.drafts[which, np.minimum(waiting, room - 1)]
        held = np.minimum(drafts, counts[answer, emitted - 1])
        rows, largest, more, following = tables.step(which, waiting, held, room)
        context = (prompts[answer] + emitted - 1) // CONTEXT_STEP
        np.add.at(total, which, forward[context, rows] + drafting[largest])
        emitted, waiting = emitted + more, following


class _Tables:
    """Rules as arrays.

    Attributes:
        drafts: ``[rules, waiting]``.
        masks: behind each place, ``[rules, waiting, k + 1]``; 0 behind drafts not verified.
    """

    def __init__(self, rules: Sequence[Rule], k: int) -> None:
        self.drafts = np.array([[plan.num_draft_tokens for plan in rule] for rule in rules])
        self.masks = np.zeros((len(rules), k + 1, k + 1), dtype=int)
        for at, rule in enumerate(rules):
            for waiting, plan in enumerate(rule):
                self.masks[at, waiting, : len(plan.mask_counts)] = plan.mask_counts
        self._places = np.arange(k + 1)
        self._enough = 2 * (k + 1)
        rooms = np.arange(self._enough + 1)[:, None, None, None]
        useful = np.clip(self.masks, 0, np.maximum(rooms - 2 - self._places, 0))
        self._rows = 1 + self.drafts + useful.sum(-1)  # [room, rules, waiting]
        self._largest = useful.max(-1)

    def step(
        self, which: np.ndarray, waiting: np.ndarray, held: np.ndarray, room: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows, largest group, tokens emitted and drafts that wait next, each ``[steps]``."""
        waiting = np.minimum(waiting, room - 1)
        capped = np.minimum(room, self._enough)
        rows, largest = self._rows[capped, which, waiting], self._largest[capped, which, waiting]
        following = np.minimum(self.masks[which, waiting, held], np.maximum(room - 2 - held, 0))
        return rows, largest, held + 1, following
