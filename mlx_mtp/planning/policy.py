"""The best policy: which drafts to verify and where to put masks, for each number of drafts.

Decoding is a semi-Markov decision process.  Its state is the number of drafts that wait to be
verified.  An action verifies d of them and puts c_a masks after the pending token (a = 0) and after
each verified draft (a = 1 .. d).  If a drafts are accepted, the step emits a + 1 tokens and the
masks after the a-th yield the drafts of the next state.  The policy with the most tokens per
millisecond in the long run satisfies

    values[w] = max over d <= w and c_0 .. c_d of
                expected_tokens(d) - rate * step_ms + sum over a of P(a accepted) * values[c_a]

with ``values[0] = 0`` and ``rate`` the best policy's tokens per millisecond.  It is found by policy
iteration under the average-reward criterion (Puterman, Markov Decision Processes, 1994, section
11.4).  For a fixed d the sum over a is a knapsack: anchors share a number of mask rows.  Dynamic
programming over the anchors solves it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESET_PROB = 1e-3  # probability that drafts are lost, as at an answer's end; connects all states
MAX_ROUNDS = 30


@dataclass(frozen=True)
class Action:
    """What a step does.

    Attributes:
        num_draft_tokens: drafts to verify.
        mask_counts: masks after the pending token and after each draft, ``[1 + drafts]``.
    """

    num_draft_tokens: int
    mask_counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the step with one pending token."""
        return 1 + self.num_draft_tokens + sum(self.mask_counts)


PLAIN = Action(0, (0,))


@dataclass(frozen=True)
class Policy:
    """The best action for each state.

    Attributes:
        actions: by number of waiting drafts, ``[k + 1]``.
        rate: tokens per millisecond in the long run.
        values: value of the waiting drafts in tokens, ``[k + 1]``.
    """

    actions: tuple[Action, ...]
    rate: float
    values: np.ndarray


def best_policy(
    prefix_probs: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
    *,
    start: Policy | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> Policy:
    """Find the policy that emits the most tokens per millisecond.

    Args:
        prefix_probs: probability that at least j drafts are accepted, ``[k + 1]``, from 1.0 at
            j = 0 downwards.
        forward_ms: milliseconds of a step by its rows, without drafting, ``[R + 1]``; index 0 is
            unused and R bounds the rows of a step.
        draft_ms: milliseconds of drafting by the size of the mask group, ``[k + 1]``, 0.0 at 0.
        start: a policy for nearly the same numbers, which saves rounds.
        max_rounds: maximum rounds of improvement; one is nearly always enough from a good start.

    Raises:
        ValueError: the shapes do not fit, or there is not one row.
    """
    k = len(prefix_probs) - 1
    if len(draft_ms) != k + 1 or len(forward_ms) < 2:
        raise ValueError(
            f"{k} drafts need {k + 1} draft times and at least one row, "
            f"got {len(draft_ms)} and {len(forward_ms) - 1}"
        )
    forward_ms = forward_ms[: _max_useful_rows(prefix_probs, forward_ms) + 1]
    fits = start is not None and _fits(start, k, len(forward_ms) - 1)
    actions = start.actions if start and fits else (PLAIN,) * (k + 1)
    rate, values = _evaluate(actions, prefix_probs, forward_ms, draft_ms)
    for _ in range(max_rounds):
        better = _improve(rate, values, prefix_probs, forward_ms, draft_ms)
        if better == actions:
            break
        actions = better
        rate, values = _evaluate(actions, prefix_probs, forward_ms, draft_ms)
    return Policy(actions, rate, values)


def _max_useful_rows(prefix_probs: np.ndarray, forward_ms: np.ndarray) -> int:
    """Number of rows beyond which no step can be the best.

    Let S be the most tokens that a step can emit on average.  Waiting drafts are worth at most
    S - 1 tokens, because without them the same masks fit into a cheaper step, and no best policy is
    slower than plain decoding.  So a step that takes more than 2 S - 1 plain steps loses to a plain
    one.
    """
    max_ms = (2 * prefix_probs.sum() - 1) * forward_ms[1] * (1 + 1e-9)
    return max(1, int(np.searchsorted(forward_ms[1:], max_ms, side="right")))


def _fits(policy: Policy, k: int, max_rows: int) -> bool:
    """Whether a policy has k + 1 states and no step of more rows."""
    rows = max(action.num_rows for action in policy.actions)
    return len(policy.actions) == k + 1 and rows <= max_rows


def expected_tokens(prefix_probs: np.ndarray, num_draft_tokens: int) -> float:
    """Tokens that a step emits on average if it verifies this many drafts."""
    return float(prefix_probs[: num_draft_tokens + 1].sum())


def accepted_probs(prefix_probs: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Probability that exactly a of the verified drafts are accepted, ``[drafts + 1]``."""
    probs = prefix_probs[: num_draft_tokens + 1].copy()
    probs[:-1] -= prefix_probs[1 : num_draft_tokens + 1]
    return probs


def step_ms(action: Action, forward_ms: np.ndarray, draft_ms: np.ndarray) -> float:
    """Milliseconds of a step."""
    return float(forward_ms[action.num_rows] + draft_ms[max(action.mask_counts)])


def _evaluate(
    actions: tuple[Action, ...],
    prefix_probs: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Rate and values of a policy: one linear system with the rate in place of ``values[0]``."""
    size = len(actions)
    system, emitted = np.eye(size), np.empty(size)
    system[0, 0] = 0.0
    for state, action in enumerate(actions):
        emitted[state] = expected_tokens(prefix_probs, action.num_draft_tokens)
        probs = accepted_probs(prefix_probs, action.num_draft_tokens) * (1 - RESET_PROB)
        for prob, num_masks in zip(probs, action.mask_counts, strict=True):
            if num_masks:
                system[state, num_masks] -= prob
        system[state, 0] += step_ms(action, forward_ms, draft_ms)
    solution = np.linalg.solve(system, emitted)
    rate = float(solution[0])
    solution[0] = 0.0
    return rate, solution


def _improve(
    rate: float,
    values: np.ndarray,
    prefix_probs: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
) -> tuple[Action, ...]:
    """The best action for each state if ``values`` follow it."""
    k, max_masks = len(prefix_probs) - 1, len(forward_ms) - 2
    largest = int((values > values.max() - 1e-12).argmax())  # more masks give no better drafts
    values = values[: largest + 1]
    cost = rate * (forward_ms[1:] + draft_ms[: largest + 1, None])  # [largest group, rows - 1]
    # tables[a][g, m]: best value of m masks at the first a anchors, in groups of at most g.
    tables = [np.full((largest + 1, max_masks + 1), -np.inf)]
    tables[0][:, 0] = 0.0
    gains: list[np.ndarray] = []
    best_value, best, actions = -np.inf, PLAIN, []
    for drafts in range(min(k, max_masks) + 1):
        gain_at_last = (1 - RESET_PROB) * prefix_probs[drafts] * values
        table = _with_anchor(tables[-1], gain_at_last)
        score = table[:, : max_masks + 1 - drafts] - cost[:, drafts:]
        group, num_masks = divmod(int(score.argmax()), score.shape[1])
        value = expected_tokens(prefix_probs, drafts) + float(score[group, num_masks])
        if value > best_value + 1e-12:
            best_value = value
            best = _trace([*tables, table], [*gains, gain_at_last], group, num_masks)
        actions.append(best)
        if drafts < k:
            stop_prob = prefix_probs[drafts] - prefix_probs[drafts + 1]
            gains.append((1 - RESET_PROB) * stop_prob * values)
            tables.append(_with_anchor(tables[-1], gains[-1]))
    return tuple(actions + [best] * (k + 1 - len(actions)))


def _with_anchor(table: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Add an anchor that may take c of the masks and is then worth ``gain[c]``.

    Args:
        table: best value by largest group and number of masks so far, ``[G + 1, masks + 1]``.
        gain: ``[G + 1]``.
    """
    better = table + gain[0]
    for count in range(1, min(len(gain), table.shape[1])):
        taken = table[count:, : table.shape[1] - count] + gain[count]
        np.maximum(better[count:, count:], taken, out=better[count:, count:])
    return better


def _trace(tables: list[np.ndarray], gains: list[np.ndarray], group: int, masks: int) -> Action:
    """The mask counts that led to a table entry, recovered from the last anchor to the first."""
    counts: list[int] = []
    for before, after, gain in reversed(list(zip(tables[:-1], tables[1:], gains, strict=True))):
        counts.append(
            next(
                count
                for count in range(min(group, masks) + 1)
                if before[group, masks - count] + gain[count] == after[group, masks]
            )
        )
        masks -= counts[-1]
    return Action(len(counts) - 1, tuple(reversed(counts)))
