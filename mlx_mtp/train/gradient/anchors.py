"""Choice of the mask blocks of a sequence, and their division into forwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_mtp.evaluation.mask_blocks import MaskRows


def choose_anchors(
    answer: Sequence[bool], *, count: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw different anchors of a sequence, in order.

    Any token can be an anchor whose next two tokens belong to an answer: the model itself predicts
    the first, the first mask the second.

    Args:
        answer: for each token of the sequence, whether it belongs to an answer.
        count: maximum number of anchors.
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
    max_masks: int,
    drop_late: float,
    rng: np.random.Generator,
) -> tuple[int, ...]:
    """Number of masks after each anchor that have a token of the answer to predict.

    Args:
        answer: for each token of the sequence, whether it belongs to an answer.
        anchors: from ``choose_anchors``.
        max_masks: k, the maximum number of masks of a block.
        drop_late: probability that a block ends before each mask after its first.
        rng: the generator to draw from.
    """
    flags = np.array(answer, dtype=bool)
    ends = np.append(np.flatnonzero(~flags), len(flags))
    counts = []
    for anchor in anchors:
        room = int(ends[np.searchsorted(ends, anchor + 1)]) - anchor - 2
        length = int(rng.geometric(drop_late)) if drop_late else max_masks
        counts.append(min(max_masks, room, length))
    return tuple(counts)


def chunks(rows: MaskRows, *, max_rows: int) -> list[MaskRows]:
    """Divide blocks, in order, into as few forwards as possible, of about the same size.

    A block stays whole.  Forwards are few because each has a cost apart from its rows.
    """
    counts = rows._counts.tolist()
    fewest = -(-rows.num_rows // max_rows)
    even = -(-rows.num_rows // max(fewest, 1)) + max(counts, default=1) - 1
    limit = min(even, max_rows)
    parts: list[tuple[list[int], list[int]]] = []
    for anchor, count in zip(rows.anchors, counts, strict=True):
        if not parts or sum(parts[-1][1]) + count > limit:
            parts.append(([], []))
        parts[-1][0].append(anchor)
        parts[-1][1].append(count)
    return [MaskRows(tuple(anchors), tuple(counts)) for anchors, counts in parts]
