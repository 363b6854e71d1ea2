"""Counts that become an adapter's statistics: ranks in evaluated text, tokens in training text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.statistics import COVERAGE_SIZES, MAX_RANK, DraftVocabulary, RankCounts

NO_KIND, OTHERS = "text", "other kinds"
_MAX_KINDS = 24  # a user's data may have a kind of its own in every record


def rank_counts(ranks: np.ndarray, rooms: np.ndarray) -> RankCounts:
    """Count the ranks of the right token by position.

    Args:
        ranks: from ``acceptance.draft_ranks`` with ``MAX_RANK`` candidates, ``[N, k]``.
        rooms: tokens of the answer after the one that follows each anchor, ``[N]``; a draft after
            them is not counted.
    """
    k = ranks.shape[1]
    has_room = rooms[:, None] > np.arange(k)
    ranks = np.where(has_room, ranks, 0)
    right = np.logical_and.accumulate(ranks == 1, axis=1)
    is_on = np.concatenate([np.ones((len(ranks), 1), bool), right[:, :-1]], axis=1)

    def by_rank(chosen: np.ndarray) -> tuple[tuple[int, ...], ...]:
        table = [((ranks == rank) & chosen).sum(axis=0) for rank in range(1, MAX_RANK + 2)]
        return tuple(map(tuple, np.stack(table, axis=1).tolist()))

    return RankCounts(
        num_anchors=tuple(has_room.sum(axis=0).tolist()),
        ranks=by_rank(is_on),
        side_ranks=by_rank(~is_on),
    )


def by_frequency(kinds: Iterable[str]) -> Mapping[str, str]:
    """Names to count kinds under: their own, or ``OTHERS`` of rare kinds if there are many."""
    order = [kind for kind, _ in Counter(kinds).most_common()]
    names = {kind: kind or NO_KIND for kind in order}
    if len(order) > _MAX_KINDS:
        names |= dict.fromkeys(order[_MAX_KINDS - 1 :], OTHERS)
    return names


def count_vocabulary(
    texts: Sequence[TokenSequence], held_out: Sequence[TokenSequence] = ()
) -> DraftVocabulary | None:
    """Count the tokens in the answers of training text; None if there are none.

    Args:
        texts: the training text.
        held_out: other text of the model, whose coverage by the most frequent ids is measured.
    """
    counts = np.bincount(_answer_ids(texts))
    ids = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if not len(ids):
        return None
    others, covered = _answer_ids(held_out), ()
    if len(others):
        shares = [np.isin(others, ids[:size]).mean() for size in COVERAGE_SIZES]
        covered = tuple(round(float(share), 4) for share in shares)
    return DraftVocabulary(
        ids=tuple(ids.tolist()), counts=tuple(counts[ids].tolist()), held_out=covered
    )


def _answer_ids(texts: Sequence[TokenSequence]) -> np.ndarray:
    """The ids in answers, ``[T]``."""
    parts = [np.array(text.ids, np.int64)[np.array(text.answer, bool)] for text in texts]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
