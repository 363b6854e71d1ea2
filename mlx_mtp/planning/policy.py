"""The best layout for every number of waiting drafts, from what rows cost and how drafts hold.

Decoding is a chain of steps whose state is how many drafts wait.  A step verifies some of them (d)
and puts masks behind the last pending row and behind each draft verified; if a drafts hold, it
emits a + 1 tokens and leaves the masks behind the a-th as the next step's drafts.  Looked for is
the rule that emits most tokens a millisecond in the long run:

    values[w] = max over d <= w and the mask counts c_0 .. c_d of emitted(d)
                - rate * ms(rows, largest c) + sum over a of P(a drafts hold) * values[c_a]

``rate`` is that of the best rule and ``values[0]`` is 0 (a semi-Markov decision process under the
average reward; policy iteration as in Puterman 1994, section 11.4).  For a number of drafts the sum
over a is a knapsack with the masks' rows as its room, so each improvement is exact over the whole
family, which brute force in the tests agrees with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

FORGET = (
    1e-3  # chance that a step's drafts are lost, as at an answer's end; ties all states together
)
MOST_ROUNDS = 30


@dataclass(frozen=True)
class StepPlan:
    """What a step does.

    Attributes:
        num_draft_tokens: drafts to verify.
        mask_counts: masks behind the last pending row and each draft, ``[1 + drafts]``.
    """

    num_draft_tokens: int
    mask_counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the step with one pending row."""
        return 1 + self.num_draft_tokens + sum(self.mask_counts)


PLAIN = StepPlan(0, (0,))


@dataclass(frozen=True)
class Policy:
    """The best rule and what it is worth.

    Attributes:
        plans: for each number of waiting drafts, ``[k + 1]``.
        rate: tokens a millisecond in the long run.
        values: what waiting drafts are worth, in tokens, ``[k + 1]``.
    """

    plans: tuple[StepPlan, ...]
    rate: float
    values: np.ndarray


def best_policy(
    holds: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
    *,
    start: Policy | None = None,
    rounds: int = MOST_ROUNDS,
) -> Policy:
    """Find the rule that emits most tokens a millisecond.

    Args:
        holds: chance that at least j drafts hold, ``[k + 1]``, from 1.0 at j = 0 downwards.
        forward_ms: time of a step by its rows, drafting left out, ``[R + 1]``; index 0 is unused
            and R bounds the rows of a step.
        draft_ms: time to draft from a mask group by its size, ``[k + 1]``, 0.0 at 0.
        start: a rule for nearly the same numbers, which saves rounds.
        rounds: most rounds of improvement; one is nearly always enough behind a good start.

    Raises:
        ValueError: the shapes do not fit, or there is not one row.
    """
    k = len(holds) - 1
    if len(draft_ms) != k + 1 or len(forward_ms) < 2:
        raise ValueError(
            f"{k} drafts need {k + 1} draft times and at least one row, "
            f"got {len(draft_ms)} and {len(forward_ms) - 1}"
        )
    forward_ms = forward_ms[: _useful_rows(holds, forward_ms) + 1]
    fits = start is not None and _fits(start, k, len(forward_ms) - 1)
    plans = start.plans if start and fits else (PLAIN,) * (k + 1)
    rate, values = _evaluate(plans, holds, forward_ms, draft_ms)
    for _ in range(rounds):
        better = _improve(rate, values, holds, forward_ms, draft_ms)
        if better == plans:
            break
        plans = better
        rate, values = _evaluate(plans, holds, forward_ms, draft_ms)
    return Policy(plans, rate, values)


def _useful_rows(holds: np.ndarray, forward_ms: np.ndarray) -> int:
    """Rows beyond which no step can be best.

    With S tokens emitted at most on average, waiting drafts are worth S - 1 at most (without them
    the same masks could be placed in a cheaper step), and no rule is slower than plain decoding; so
    a step that takes more than 2 S - 1 plain ones is worth less than a plain one.
    """
    most_ms = (2 * holds.sum() - 1) * forward_ms[1] * (1 + 1e-9)
    return max(1, int(np.searchsorted(forward_ms[1:], most_ms, side="right")))


def _fits(policy: Policy, k: int, most_rows: int) -> bool:
    """Whether a rule is one for such sizes."""
    rows = max(plan.num_rows for plan in policy.plans)
    return len(policy.plans) == k + 1 and rows <= most_rows


def expected_tokens(holds: np.ndarray, num_draft_tokens: int) -> float:
    """Tokens that a step emits on average if it verifies so many drafts."""
    return float(holds[: num_draft_tokens + 1].sum())


def stop_chances(holds: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Chance that exactly a of the verified drafts hold, ``[drafts + 1]``."""
    chances = holds[: num_draft_tokens + 1].copy()
    chances[:-1] -= holds[1 : num_draft_tokens + 1]
    return chances


def step_ms(plan: StepPlan, forward_ms: np.ndarray, draft_ms: np.ndarray) -> float:
    """Time of a step."""
    return float(forward_ms[plan.num_rows] + draft_ms[max(plan.mask_counts)])


def step_value(
    plan: StepPlan,
    policy: Policy,
    holds: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
) -> float:
    """What a step is worth in tokens if ``policy`` goes on behind it; ``holds`` is its drafts'."""
    emitted = expected_tokens(holds, plan.num_draft_tokens)
    chances = stop_chances(holds, plan.num_draft_tokens)
    later = float(chances @ policy.values[list(plan.mask_counts)]) * (1 - FORGET)
    return emitted - policy.rate * step_ms(plan, forward_ms, draft_ms) + later


def _evaluate(
    plans: tuple[StepPlan, ...], holds: np.ndarray, forward_ms: np.ndarray, draft_ms: np.ndarray
) -> tuple[float, np.ndarray]:
    """Rate and values of a rule: one linear system, with the rate in the place of values[0]."""
    size = len(plans)
    system, emitted = np.eye(size), np.empty(size)
    system[0, 0] = 0.0
    for state, plan in enumerate(plans):
        emitted[state] = expected_tokens(holds, plan.num_draft_tokens)
        chances = stop_chances(holds, plan.num_draft_tokens) * (1 - FORGET)
        for chance, masks in zip(chances, plan.mask_counts, strict=True):
            if masks:
                system[state, masks] -= chance
        system[state, 0] += step_ms(plan, forward_ms, draft_ms)
    solved = np.linalg.solve(system, emitted)
    rate = float(solved[0])
    solved[0] = 0.0
    return rate, solved


def _improve(
    rate: float,
    values: np.ndarray,
    holds: np.ndarray,
    forward_ms: np.ndarray,
    draft_ms: np.ndarray,
) -> tuple[StepPlan, ...]:
    """The best step for each state, if ``values`` is what follows it.

    ``room[cap, t]`` is the most that t masks in groups of at most ``cap`` are worth, over the
    anchors so far; an anchor's group is chosen by a maximum over its sizes.  An anchor may be the
    last one or not, which is reckoned at once: it is the calls that take the time.
    """
    k, most = len(holds) - 1, len(forward_ms) - 2
    padded = np.full((k + 1, k + most + 1), -np.inf)
    shifted = sliding_window_view(padded, most + 1, axis=1)[:, ::-1]  # [cap, c, t]: room[cap, t-c]
    too_large = np.where(np.tri(k + 1, dtype=bool), 0.0, -np.inf)  # [cap, c]
    room = padded[:, k:].copy()
    room[:, 0] = 0.0
    cost = rate * (forward_ms[1:] + draft_ms[:, None])  # [cap, rows - 1]
    rooms, worths = [room], []
    best, plan, plans = -np.inf, PLAIN, []
    for drafts in range(min(k, most) + 1):
        worth = (1 - FORGET) * holds[drafts] * values
        goes_on = (1 - FORGET) * (holds[drafts] - holds[min(drafts + 1, k)]) * values
        padded[:, k:] = room
        both = np.stack([worth, goes_on])[:, None] + too_large  # [2, cap, c]
        whole, more = (shifted + both[..., None]).max(axis=2)
        score, cap, total = _highest(whole[:, : most + 1 - drafts] - cost[:, drafts:])
        value = expected_tokens(holds, drafts) + score
        if value > best + 1e-12:
            best = value
            plan = _trace([*rooms, whole], [*worths, worth], cap, total)
        if drafts < k:
            worths.append(goes_on)
            room = more
            rooms.append(room)
        plans.append(plan)
    return tuple(plans + [plan] * (k + 1 - len(plans)))


def _highest(score: np.ndarray) -> tuple[float, int, int]:
    """The highest value of a table and where it stands."""
    row, column = divmod(int(score.argmax()), score.shape[1])
    return float(score[row, column]), row, column


def _trace(rooms: list[np.ndarray], worths: list[np.ndarray], cap: int, total: int) -> StepPlan:
    """The mask counts that led to a sum, found by going back through the anchors."""
    counts: list[int] = []
    for before, after, worth in reversed(list(zip(rooms, rooms[1:], worths, strict=False))):
        sizes = range(min(cap, total) + 1)
        wanted = after[cap, total]
        counts.append(next(c for c in sizes if before[cap, total - c] + worth[c] == wanted))
        total -= counts[-1]
    return StepPlan(len(counts) - 1, tuple(reversed(counts)))
