"""Which nodes of a tree of drafts a step verifies, and which of them masks follow.

A node is accepted if its parent is and the model takes its token, so its probability p(u) is the
product of the conditional ones along its path.  A step that verifies the nodes T and puts c_v masks
after the last token (v = 0) and after each node is worth, before the price of its rows,

    1 + sum over u in T of p(u) + sum over v of stop(v) * values[c_v]
    stop(v) = p(v) - sum over the children u of v in T of p(u)

in tokens: stop(v) is the probability that v is the last accepted node, and ``values`` what waiting
drafts are worth (``policy``).  Whatever the number n of nodes, the n likeliest add the most tokens,
and with their parents they are closed, because no node is likelier than its parent.  For fixed
nodes the masks are a sum of concave functions, so the masks of the highest gain are the best ones,
taken one by one.  That gives a table over n and the number of masks, from which any price of rows
picks its entry.  The exact optimum (a knapsack on the tree) is 0 to 0.5% better on random trees and
takes a hundred times as long, because only nodes of nearly equal probability compete.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_mtp.planning.offer import OfferedTree
from mlx_mtp.planning.policy import RESET_PROB

_MIN_PROB = 1e-3  # no row is worth less than this


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
        mask_ms: milliseconds of drafting by the size of the mask group, ``[k + 1]``.
        rate: tokens per millisecond of the best policy.
        room: tokens that may still be emitted, at least 1.
    """
    max_rows, k = len(forward_ms) - 1, len(values) - 1
    kept, probs, parents, depths = _likeliest(tree, min(max_rows - 1, len(tree.probs)), room)
    num_nodes = len(kept)
    # stop[n, v]: probability that v is the last accepted one of the n likeliest nodes.
    taken = np.zeros((num_nodes + 1, num_nodes + 1))
    taken[np.arange(1, num_nodes + 1), parents] = probs[1:]
    stop = np.tri(num_nodes + 1) * probs - np.cumsum(taken, axis=0)
    # gains[n, v, c]: by one more mask after v, which has c; later ones never gain more.
    steps = (1 - RESET_PROB) * np.minimum.accumulate(np.maximum(np.diff(values), 0))
    useful = np.arange(k) < room - 2 - depths[:, None]
    gains = (stop[:, :, None] * np.where(useful, steps, 0)).reshape(num_nodes + 1, -1)
    order = np.argsort(-gains, axis=1, kind="stable")[:, : max_rows - 1]
    gained = np.take_along_axis(gains, order, axis=1)
    largest = np.maximum.accumulate(order % k + 1, axis=1) if k else order
    total = np.pad(np.cumsum(gained, axis=1), [(0, 0), (1, 0)])
    total += np.cumsum(probs)[:, None]  # [n, masks]
    rows = np.arange(1, num_nodes + 2)[:, None] + np.arange(total.shape[1])
    fits = rows <= max_rows
    ms = forward_ms[np.where(fits, rows, 0)] + mask_ms[np.pad(largest, [(0, 0), (1, 0)])]
    total = np.where(fits, total - rate * ms, -np.inf)
    num_verified, num_masks = divmod(int(total.argmax()), total.shape[1])
    chosen = order[num_verified, :num_masks]
    chosen = chosen[gains[num_verified, chosen] > 0] // max(k, 1)
    counts = np.bincount(chosen, minlength=num_nodes + 1)
    ascending = np.argsort(kept[:num_verified])
    return TreeStep(
        nodes=tuple((kept[ascending] + 1).tolist()),
        mask_counts=tuple(counts[[0, *(ascending + 1)]].tolist()),
        probs=probs[[0, *(ascending + 1)]],
        value=float(total[num_verified, num_masks]),
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
