"""Which nodes of a tree of drafts a step verifies, and which of them masks follow.

A node is accepted if its parent is and the model takes its token, so its probability p(u) is the
product of the conditional ones along its path, and stop(v) = p(v) - sum of p(u) over the verified
children u of v is the probability that v is the last accepted node (v = 0 is the last token).

**Masks.**  Masks serve every place below them: after a node at distance t from the masks, mask
t + d still predicts the d-th draft, though without having seen the t drafts between.  The d-th
draft comes from the nearest masks that reach it (``nearest_masks``).  Waiting drafts are worth
``values`` (``policy``), so the d-th is worth w_d = values[d] - values[d - 1], less if it comes
from masks at a distance: w_d * LAG[t].  Before the price of its rows a step is worth

    1 + sum over verified u of p(u) + sum over v of stop(v) * sum over d of w_d * LAG[t(v, d)]

**Search.**  Rows are added for the highest gain per row: a mask after one of the nodes, or one of
the two likeliest nodes that may follow, alone or with up to three masks.  Of the steps on the way
the one that is worth most after the price of its rows is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_mtp.planning.offer import OfferedTree
from mlx_mtp.planning.policy import RESET_PROB

LAG = np.array([1.0, *0.8 * 0.9 ** np.arange(64)])  # measured: docs/results/trees.md
_MIN_PROB = 1e-3  # no row is worth less than this
_MAX_OWN = 3  # masks that are added with a node


@dataclass(frozen=True, eq=False)
class TreeStep:
    """A step with nodes of a tree.

    Attributes:
        nodes: which nodes are verified, counted from 1, ascending.
        mask_counts: masks after the last token and after each node, ``[1 + nodes]``.
        probs: probability that each node is accepted, after 1.0 for the last token,
            ``[1 + nodes]``.
        value: what the step is worth in tokens.
    """

    nodes: tuple[int, ...]
    mask_counts: tuple[int, ...]
    probs: np.ndarray
    value: float


def nearest_masks(
    parents: Sequence[int], mask_counts: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """The masks that predict the drafts after each node, ``[1 + nodes]``.

    Args:
        parents: of each node, counted from 1; 0 is the last token.
        mask_counts: masks after the last token and after each node, ``[1 + nodes]``.

    Returns:
        For each node and each draft after it, the node whose masks predict it, and which of them,
        counted from 0.
    """
    found = list[list[tuple[int, int]]]()
    for node, count in enumerate(mask_counts):
        own = [(node, index) for index in range(count)]
        above = found[parents[node - 1]][1:] if node else []  # one draft further away
        found.append(own + above[count:])
    return found


def worth_by_lag(values: np.ndarray) -> list[list[float]]:
    """Worth of the d-th waiting draft from masks at distance t, ``[t][d - 1]``.

    Args:
        values: value of waiting drafts in tokens, ``[k + 1]``, 0.0 at 0.

    Returns:
        k + 2 lines; the last is of drafts that no masks predict, and all zeros.
    """
    steps = (1 - RESET_PROB) * np.minimum.accumulate(np.maximum(np.diff(values), 0))
    lines = LAG[: len(values), None] * steps
    return [*lines.tolist(), [0.0] * len(steps)]


def best_step(
    tree: OfferedTree,
    worth: list[list[float]],
    forward_ms: np.ndarray,
    mask_ms: np.ndarray,
    *,
    rate: float,
    room: int,
) -> TreeStep:
    """Find the best step of one pending row and nodes of a tree.

    Args:
        tree: the nodes, parents first.
        worth: of waiting drafts (``worth_by_lag``).
        forward_ms: milliseconds of a forward by its rows, ``[R + 1]``; R bounds the rows.
        mask_ms: milliseconds of drafting by the number of drafts, ``[k + 1]``.
        rate: tokens per millisecond of the best policy.
        room: tokens that may still be emitted, at least 1.
    """
    price = (rate * forward_ms).tolist()
    mask_price = (rate * mask_ms).tolist()
    growing = _Growing(tree, worth, room)
    value, largest = 1.0, 0
    best, best_value, moves = 0, value - price[1], list[_Move]()
    num_rows = 1
    while num_rows < len(price) - 1:
        move = growing.best_move(len(price) - 1 - num_rows)
        if move is None:
            break
        growing.apply(move)
        moves.append(move)
        num_rows += move.num_rows
        value += move.gain
        largest = max(largest, growing.counts[move.node])
        if value - price[num_rows] - mask_price[largest] > best_value:
            best, best_value = len(moves), value - price[num_rows] - mask_price[largest]
    counts = {0: 0}
    for move in moves[:best]:
        counts[move.node] = counts.get(move.node, 0) + move.num_masks
    order = sorted(counts)
    return TreeStep(
        nodes=tuple(order[1:]),
        mask_counts=tuple(counts[node] for node in order),
        probs=np.array([growing.reach[node] for node in order]),
        value=best_value,
    )


class _Move(NamedTuple):
    """Rows to add: ``num_masks`` masks after a node, and the node itself if it is new."""

    gain: float
    node: int
    is_new: bool
    num_masks: int

    @property
    def num_rows(self) -> int:
        return self.num_masks + self.is_new


class _Growing:
    """A step to which rows are added.

    Attributes:
        reach: probability that each node of the tree is accepted.
        counts: masks after the nodes of the step.
    """

    def __init__(self, tree: OfferedTree, worth: list[list[float]], room: int) -> None:
        self._worth, self._k = worth, len(worth) - 2
        self._parents = [0, *tree.parents.tolist()]
        self.reach, self._depths = [1.0], [0]
        self._children: dict[int, list[int]] = {}
        for node, prob in enumerate(tree.probs.tolist(), start=1):
            parent = self._parents[node]
            self.reach.append(prob * self.reach[parent])
            self._depths.append(self._depths[parent] + 1)
            if self.reach[-1] > _MIN_PROB and self._depths[-1] < room:
                self._children.setdefault(parent, []).append(node)
        self._room = room - 2  # of waiting drafts after the last token
        self._next = self._sorted(self._children.get(0, []))
        self.counts = {0: 0}
        self._stop = {0: 1.0}
        self._below = {0: [0]}  # the node and those after it
        self._lags = {0: [self._k + 1] * self._k}  # of each draft after a node; k + 1 has no masks
        self._later = {0: 0.0}  # what the drafts after a node are worth

    def best_move(self, max_rows: int) -> _Move | None:
        """The move of the highest gain per row, if any gains anything."""
        best, best_move = 0.0, None
        worth, depths, stop = self._worth, self._depths, self._stop
        for node, count in self.counts.items():
            depth, gain = depths[node], 0.0
            if count >= self._k or count >= self._room - depth:
                continue
            for place in self._below[node]:
                lag = depths[place] - depth
                draft = count - lag  # counted from 0
                if draft >= 0:
                    more = worth[lag][draft] - worth[self._lags[place][draft]][draft]
                    if more > 0:
                        gain += stop[place] * more
            if gain > best:
                best, best_move = gain, _Move(gain, node, False, 1)
        for node in self._next[:2]:
            parent = self._parents[node]
            later, most = self._inherited(parent), self._room - depths[node]
            gain = 1 + sum(worth[lag][draft] for draft, lag in enumerate(later))
            gain -= self._later[parent]
            for count in range(min(_MAX_OWN, max_rows - 1, self._k, max(most, 0)) + 1):
                if count:
                    draft = count - 1
                    gain += worth[0][draft] - worth[later[draft]][draft]
                if self.reach[node] * gain > best * (1 + count):
                    best = self.reach[node] * gain / (1 + count)
                    best_move = _Move(self.reach[node] * gain, node, True, count)
        return best_move

    def apply(self, move: _Move) -> None:
        """Add the rows of a move."""
        node, worth, depths = move.node, self._worth, self._depths
        if move.is_new:
            parent = self._parents[node]
            self._next.remove(node)
            self._next = self._sorted(self._next + self._children.get(node, []))
            self.counts[node], self._below[node] = 0, []
            self._stop[node] = self.reach[node]
            self._stop[parent] -= self.reach[node]
            self._lags[node] = self._inherited(parent)
            above = node
            while True:
                self._below[above].append(node)
                if not above:
                    break
                above = self._parents[above]
        for _ in range(move.num_masks):
            count, depth = self.counts[node], depths[node]
            for place in self._below[node]:
                lag = depths[place] - depth
                if count >= lag and lag < self._lags[place][count - lag]:
                    self._lags[place][count - lag] = lag
            self.counts[node] += 1
        for place in self._below[node]:
            self._later[place] = sum(worth[lag][i] for i, lag in enumerate(self._lags[place]))

    def _inherited(self, parent: int) -> list[int]:
        """Lags of the drafts after a new node, from masks before it."""
        none = self._k + 1
        lags = [min(lag + 1, none) for lag in self._lags[parent][1:]]
        return [*lags, none] if self._k else []

    def _sorted(self, nodes: list[int]) -> list[int]:
        return sorted(nodes, key=lambda node: -self.reach[node])
