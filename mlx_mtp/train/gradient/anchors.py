"""Which mask blocks of a sequence are trained on, and how they are divided into forwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_mtp.evaluation.mask_blocks import MaskRows


def choose_anchors(
    answer: Sequence[bool], *, count: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw the anchors of a sequence, without repetition, in order.

    An anchor may be any token whose next two tokens belong to an answer: the first is the model's
    own prediction, the second that of the first mask.

    Args:
        answer: for each token of the sequence, whether it belongs to an answer.
        count: how many anchors are wanted; fewer where there is no room.
        rng: the generator to draw from.
    """
    flags = np.array(answer, dtype=bool)
    allowed = np.flatnonzero(flags[1:-1] & flags[2:])
    if len(allowed) > count:
        allowed = np.sort(rng.choice(allowed, size=count, replace=False))
    return tuple(int(anchor) for anchor in allowed)


def count_masks(
    answer: Sequence[bool],
    anchors: Sequence[int],
    *,
    most: int,
    drop_late: float,
    rng: np.random.Generator,
) -> tuple[int, ...]:
    """Say how many masks stand behind each anchor: those that have something to predict.

    Args:
        answer: for each token of the sequence, whether it belongs to an answer.
        anchors: from ``choose_anchors``.
        most: k, the most masks of a block.
        drop_late: chance that a block ends before each mask but its first.
        rng: the generator to draw from.
    """
    flags = np.array(answer, dtype=bool)
    ends = np.append(np.flatnonzero(~flags), len(flags))
    counts = []
    for anchor in anchors:
        room = int(ends[np.searchsorted(ends, anchor + 1)]) - anchor - 2
        length = int(rng.geometric(drop_late)) if drop_late else most
        counts.append(min(most, room, length))
    return tuple(counts)


def chunks(rows: MaskRows, *, most_rows: int) -> list[MaskRows]:
    """Divide blocks, in order, into as few forwards of at most that many rows, of about one size.

    A block stays whole.  What a forward costs beside its rows is paid for few rows as for many.
    """
    counts = rows._counts.tolist()
    fewest = -(-rows.num_rows // most_rows)
    even = -(-rows.num_rows // max(fewest, 1)) + max(counts, default=1) - 1
    limit = min(even, most_rows)
    found: list[tuple[list[int], list[int]]] = []
    for anchor, count in zip(rows.anchors, counts, strict=True):
        if not found or sum(found[-1][1]) + count > limit:
            found.append(([], []))
        found[-1][0].append(anchor)
        found[-1][1].append(count)
    return [MaskRows(tuple(anchors), tuple(counts)) for anchors, counts in found]
