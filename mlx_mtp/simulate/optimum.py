"""How good ``auto`` could be: the best rule in hindsight, and what a clairvoyant would reach.

The offline optimum is the fastest rule (``rules``) that is found with the whole trace at hand:

- rules worked out from the trace's own statistics (``policy.best_policy``): the share of places
  behind which j drafts hold; and, as places after a rejection are not like others, the shares at
  the places that the last rule came through, a few times over;
- every rule that verifies at most d drafts and puts c masks behind each place or behind the last
  (``linear`` and ``quadratic`` with every number of drafts are among them).

All are replayed on the trace, and the fastest counts.  They are held to the rows whose cost is
known, as ``auto`` is.  ``auto`` knows neither the trace nor its statistics; but it may follow the
text from answer to answer, which no rule does, and so be faster.

The clairvoyant knows which drafts will hold: it verifies only those, and puts masks only where they
will serve.  No planner that sees the past alone can reach that; it tells how much luck there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_mtp.planning.policy import best_policy
from mlx_mtp.simulate.replay import Replay, StepCosts, replay
from mlx_mtp.simulate.rules import Rule, RulePlanner, fixed_rules, replay_rules
from mlx_mtp.simulate.trace import Trace, TracedAnswer

_REFITS = 4


@dataclass(frozen=True)
class Optimum:
    """The fastest rule on a trace.

    Attributes:
        name: how it was found.
        rule: it.
        replay: what it does.
    """

    name: str
    rule: Rule
    replay: Replay


def offline_optimum(trace: Trace, costs: StepCosts, *, most_rows: int, context: int = 0) -> Optimum:
    """Find the fastest rule in hindsight.

    Args:
        trace: the drafts that hold.
        costs: what steps take.
        most_rows: of a step.
        context: ids in the cache for which rules are worked out.
    """
    k = trace.num_draft_tokens
    forward = np.array(costs.forward_ms(context)[: most_rows + 1])
    draft = np.array([costs.draft_ms(size) for size in range(k + 1)])
    rules: dict[Rule, str] = {}
    shares = trace.holds()
    for turn in range(_REFITS):
        rule = best_policy(shares, forward, draft).actions
        rules.setdefault(rule, f"fitted {turn + 1}")
        shares = visited_holds(trace, rule)
    for name, rule in fixed_rules(k, most_rows):
        rules.setdefault(rule, name)
    best = list(rules)[int(replay_rules(trace, list(rules), costs).argmin())]
    return Optimum(rules[best], best, replay(trace, lambda: RulePlanner(best), costs))


def visited_holds(trace: Trace, rule: Rule) -> np.ndarray:
    """Chance that at least j drafts hold at the places where a rule verifies j, ``[k + 1]``.

    Where it never verifies so many, the next draft is taken to hold as it does all over the trace.
    """
    k = trace.num_draft_tokens
    seen, held = np.zeros(k), np.zeros(k)
    for answer in trace.answers:
        at, waiting = 0, rule[0].mask_counts[0]
        while at < len(answer.counts):
            plan = rule[min(waiting, len(answer.counts) - at)]
            count = min(plan.num_draft_tokens, answer.counts[at])
            seen[: min(plan.num_draft_tokens, count + 1)] += 1
            held[:count] += 1
            at, waiting = at + count + 1, plan.mask_counts[count]
    everywhere = trace.holds()
    before = np.maximum(everywhere[:-1], 1e-12)
    chances = np.where(seen > 0, held / np.maximum(seen, 1), everywhere[1:] / before)
    return np.concatenate([[1.0], np.cumprod(np.clip(chances, 0, 1))])


def clairvoyant_ms(trace: Trace, costs: StepCosts) -> float:
    """Least time behind the first steps for one who knows which drafts will hold."""
    return sum(_clairvoyant(each, costs, trace.num_draft_tokens) for each in trace.answers)


def _clairvoyant(answer: TracedAnswer, costs: StepCosts, k: int) -> float:
    """Shortest way through an answer; ``left[at][d]`` is the time from a place with d drafts.

    Only drafts that hold are verified and masks stand behind the last of them alone: any other step
    with the same outcome has as many rows or more.
    """
    counts = answer.counts
    draft = np.array([costs.draft_ms(size) for size in range(k + 1)])
    size = len(counts)
    left: list[np.ndarray] = [np.zeros(0)] * size + [np.zeros(1)] * 2
    for at in range(size - 1, -1, -1):
        forward = np.array(costs.forward_ms(answer.prompt + at))
        best = np.empty(counts[at] + 1)
        for drafts in range(counts[at] + 1):
            behind = left[at + drafts + 1]
            rows = 1 + drafts + np.arange(len(behind))
            best[drafts] = (forward[rows] + draft[: len(behind)] + behind).min()
        left[at] = best
    return float(left[0].min()) if size else 0.0
