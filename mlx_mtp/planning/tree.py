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

**Search.**  Whatever the number n of nodes, the n likeliest add the most tokens, and with their
parents they are closed, because no node is likelier than its parent.  After the last token follow
c masks, which serve all nodes; after other nodes at most two, whose gains are taken from the
largest down.  That gives a table over n, c and the number of further masks, from which any price
of rows picks its entry.  A search row by row over all nodes and places finds steps as good in ten
times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_mtp.planning.offer import OfferedTree
from mlx_mtp.planning.policy import RESET_PROB

LAG = np.array([1.0, *0.8 * 0.9 ** np.arange(64)])  # measured: docs/results/trees.md
_MIN_PROB = 1e-3  # no row is worth less than this
_MAX_OWN = 2  # masks after a draft


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


def best_step(
    tree: OfferedTree,
    values: np.ndarray,
    forward_ms: np.ndarray,
    mask_ms: np.ndarray,
    *,
    rate: float,
    room: int,
) -> TreeStep:
    """Find the best step of one pending row and nodes of a tree.

    Args:
        tree: the nodes, parents first.
        values: value of waiting drafts in tokens, ``[k + 1]``, 0.0 at 0.
        forward_ms: milliseconds of a forward by its rows, ``[R + 1]``; R bounds the rows.
        mask_ms: milliseconds of drafting by the number of drafts, ``[k + 1]``.
        rate: tokens per millisecond of the best policy.
        room: tokens that may still be emitted, at least 1.
    """
    max_rows, k = len(forward_ms) - 1, len(values) - 1
    kept, probs, parents, depths = _likeliest(tree, min(max_rows - 1, len(tree.probs)), room)
    num_nodes, num_own = len(kept), min(_MAX_OWN, k)
    # stop[n, v]: probability that v is the last accepted one of the n likeliest nodes.
    taken = np.zeros((num_nodes + 1, num_nodes + 1))
    taken[np.arange(1, num_nodes + 1), parents] = probs[1:]
    stop = np.tri(num_nodes + 1) * probs - np.cumsum(taken, axis=0)
    # worth[v, d]: of the (d + 1)-th draft after v, from masks after v; 0 if it cannot be emitted.
    drafts = np.arange(k)
    steps = (1 - RESET_PROB) * np.minimum.accumulate(np.maximum(np.diff(values), 0))
    worth = np.where(drafts < room - 2 - depths[:, None], steps, 0.0)
    # served[c, v, d]: the same from c masks after the last token.
    counts = np.arange(min(k, max_rows - 1, max(room - 2, 0)) + 1)
    reaches = counts[:, None, None] > drafts + depths[:, None]
    served = reaches * worth * LAG[depths][:, None]
    total = stop @ served.sum(axis=2).T + np.cumsum(probs)[:, None]  # [n, c]
    # gains[n, c, (v, d)]: of the (d + 1)-th mask after node v; later ones never gain more.
    more = np.minimum.accumulate((worth - served)[:, :, :num_own], axis=2)
    more[:, 0] = 0.0
    gains = (stop[:, None, :, None] * more).reshape(num_nodes + 1, len(counts), -1)
    gained = np.cumsum(-np.sort(-gains, axis=2)[:, :, : max_rows - 1], axis=2)
    total = np.concatenate([total[..., None], total[..., None] + gained], axis=2)  # [n, c, own]
    rows = np.arange(1, num_nodes + 2)[:, None, None] + counts[:, None] + np.arange(total.shape[2])
    fits = rows <= max_rows
    num_drafts = np.maximum(counts[:, None], np.minimum(np.arange(total.shape[2]), num_own))
    ms = forward_ms[np.where(fits, rows, 0)] + mask_ms[num_drafts]
    total = np.where(fits, total - rate * ms, -np.inf)
    best = int(total.argmax())
    num_verified, count, own = map(int, np.unravel_index(best, total.shape))
    gain = gains[num_verified, count]
    chosen = np.argsort(-gain, kind="stable")[:own]
    mask_counts = np.bincount(chosen[gain[chosen] > 0] // max(num_own, 1), minlength=num_nodes + 1)
    mask_counts[0] = count
    ascending = np.argsort(kept[:num_verified])
    index = np.append(0, ascending + 1)
    return TreeStep(
        nodes=tuple((kept[ascending] + 1).tolist()),
        mask_counts=tuple(mask_counts[index].tolist()),
        probs=probs[index],
        value=float(total.flat[best]),
    )


def _likeliest(
    tree: OfferedTree, count: int, room: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The likeliest nodes in order: indices, and with the last token in front the probabilities
    and depths; parents count in this order, from 1.
    """
    reach, depths = [1.0], [0]
    for prob, parent in zip(tree.probs.tolist(), tree.parents.tolist(), strict=True):
        reach.append(prob * reach[parent])
        depths.append(depths[parent] + 1)
    probs, depth = np.array(reach), np.array(depths)
    useful = (probs > _MIN_PROB) & (depth < room)
    kept = np.argsort(np.where(useful, -probs, 1.0)[1:], kind="stable")
    kept = kept[: min(count, int(useful[1:].sum()))]
    place = np.zeros(len(probs), int)
    place[kept + 1] = np.arange(1, len(kept) + 1)
    index = np.append(0, kept + 1)
    return kept, probs[index], place[tree.parents[kept]], depth[index]
