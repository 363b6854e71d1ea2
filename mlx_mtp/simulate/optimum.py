"""Upper bounds for ``auto``: the best fixed policy in hindsight, and a clairvoyant planner.

The offline optimum is the fastest fixed policy (``policies``) among

- policies computed from the trace's own statistics (``policy.best_policy``): the acceptance
  probabilities at all positions; then, because positions after a rejection differ from others,
  those at the positions that the last policy visited, a few times over;
- every policy that verifies at most d drafts and has c masks after each of them or after the last
  (``linear`` and ``quadratic`` with every number of drafts are among them).

Each policy is replayed on the trace.  Like ``auto`` it uses only rows whose cost is known.
``auto`` knows neither the trace nor its statistics, but it adapts to the text from answer to
answer, which no fixed policy does, and so may be faster.

The clairvoyant planner knows which drafts will be accepted.  It verifies only those, and uses masks
only where their drafts will be verified.  No planner that sees only the past can reach its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_mtp.planning.policy import best_policy
from mlx_mtp.simulate.policies import Actions, PolicyPlanner, fixed_policies, replay_policies
from mlx_mtp.simulate.replay import Replay, StepCosts, replay
from mlx_mtp.simulate.trace import Trace, TracedAnswer

_NUM_FITS = 4


@dataclass(frozen=True)
class Optimum:
    """The fastest fixed policy on a trace.

    Attributes:
        name: description of the policy.
        actions: the policy.
        replay: its result.
    """

    name: str
    actions: Actions
    replay: Replay


def offline_optimum(trace: Trace, costs: StepCosts, *, max_rows: int, context: int = 0) -> Optimum:
    """Find the fastest fixed policy in hindsight.

    Args:
        trace: the accepted drafts.
        costs: durations of steps.
        max_rows: maximum rows of a step.
        context: number of ids in the cache for which policies are computed.
    """
    k = trace.num_draft_tokens
    forward = np.array(costs.forward_ms(context)[: max_rows + 1])
    draft = np.array([costs.draft_ms(size) for size in range(k + 1)])
    names: dict[Actions, str] = {}
    probs = trace.prefix_probs()
    for number in range(1, _NUM_FITS + 1):
        actions = best_policy(probs, forward, draft).actions
        names.setdefault(actions, f"fitted {number}")
        probs = visited_prefix_probs(trace, actions)
    for name, actions in fixed_policies(k, max_rows):
        names.setdefault(actions, name)
    best = list(names)[int(replay_policies(trace, list(names), costs).argmin())]
    return Optimum(names[best], best, replay(trace, lambda: PolicyPlanner(best), costs))


def visited_prefix_probs(trace: Trace, actions: Actions) -> np.ndarray:
    """Probability that at least j drafts are accepted where a policy verifies j, ``[k + 1]``.

    Where it never verifies so many, the next draft has its acceptance rate on the whole trace.
    """
    k = trace.num_draft_tokens
    num_seen, num_accepted = np.zeros(k), np.zeros(k)
    for answer in trace.answers:
        position, waiting = 0, actions[0].mask_counts[0]
        while position < len(answer.counts):
            action = actions[min(waiting, len(answer.counts) - position)]
            drafts = action.num_draft_tokens
            count = min(drafts, answer.counts[position])
            num_seen[: min(drafts, count + 1)] += 1
            num_accepted[:count] += 1
            position, waiting = position + count + 1, action.mask_counts[count]
    everywhere = trace.prefix_probs()
    default = everywhere[1:] / np.maximum(everywhere[:-1], 1e-12)
    probs = np.where(num_seen > 0, num_accepted / np.maximum(num_seen, 1), default)
    return np.concatenate([[1.0], np.cumprod(np.clip(probs, 0, 1))])


def clairvoyant_ms(trace: Trace, costs: StepCosts) -> float:
    """Minimum time after the first steps for a planner that knows which drafts are accepted."""
    return sum(_clairvoyant(answer, costs, trace.num_draft_tokens) for answer in trace.answers)


def _clairvoyant(answer: TracedAnswer, costs: StepCosts, k: int) -> float:
    """Shortest path through an answer; ``left[i][d]`` is the time from position i with d drafts.

    Only accepted drafts are verified, and masks follow only the last of them: any other step with
    the same outcome has as many rows or more.
    """
    counts = answer.counts
    if not counts:
        return 0.0
    draft = np.array([costs.draft_ms(size) for size in range(k + 1)])
    left: list[np.ndarray] = [np.zeros(0)] * len(counts) + [np.zeros(1)] * 2
    for position in reversed(range(len(counts))):
        forward = np.array(costs.forward_ms(answer.prompt + position))
        best = np.empty(counts[position] + 1)
        for drafts in range(len(best)):
            after = left[position + drafts + 1]
            rows = 1 + drafts + np.arange(len(after))
            best[drafts] = (forward[rows] + draft[: len(after)] + after).min()
        left[position] = best
    return float(left[0].min())
