"""Drafts by suffix lookup: what followed the last few ids when they stood in the text before.

Prompt lookup (Saxena 2023; also in transformers and llama.cpp): answers that repeat their prompt,
as edits and summaries do, go on as the prompt went on.  It costs no rows until drafts are verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlx_mtp.acceptance import Acceptance

SHORTEST, LONGEST = 3, 16  # ids that must match, and that are looked at
LONGEST_LOOKUP = 24  # drafts of one lookup
_KEPT = 4  # places remembered for a run of ids
_CLASSES = (3, 4, 6, 10)  # matches of such lengths, up to the next, are counted together
_PRIOR = (0.4, 0.5, 0.65, 0.8)
_PRIOR_WEIGHT = 6.0  # texts differ in how they repeat themselves


@dataclass(frozen=True)
class Found:
    """Drafts that were looked up.

    Attributes:
        tokens: what followed.
        match: how many ids before it were the same.
    """

    tokens: list[int]
    match: int


class SuffixLookup:
    """Finds earlier places of the text's last ids."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids to the text."""
        for token in ids:
            end = len(self._ids)
            if end >= SHORTEST:  # what stands before ``token`` is followed by it
                places = self._places.setdefault(tuple(self._ids[-SHORTEST:]), [])
                places.append(end)
                del places[:-_KEPT]
            self._ids.append(token)

    def find(self, most: int) -> Found:
        """What followed the longest match, the last one of several; no tokens without any."""
        places = self._places.get(tuple(self._ids[-SHORTEST:]), ())
        best, match = len(self._ids), 0
        for place in reversed(places):
            length = self._match(place)
            if length > match:
                best, match = place, length
        return Found(self._ids[best : best + most], match)

    def _match(self, place: int) -> int:
        """Ids before ``place`` that equal the text's last ones, up to ``LONGEST``."""
        end, length = len(self._ids), SHORTEST
        ids, most = self._ids, min(LONGEST, place)
        while length < most and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length


class LookupAcceptance:
    """How looked-up drafts hold, by the length of the match."""

    def __init__(self) -> None:
        self._classes = [Acceptance([chance], weight=_PRIOR_WEIGHT) for chance in _PRIOR]

    def holds(self, match: int, num_draft_tokens: int) -> np.ndarray:
        """Chance that at least j drafts hold, ``[drafts + 1]``."""
        return self._class(match).holds(num_draft_tokens)

    def observe(self, match: int, num_draft_tokens: int, num_accepted: int) -> None:
        """Count a step that verified looked-up drafts."""
        self._class(match).observe(num_draft_tokens, num_accepted)

    def _class(self, match: int) -> Acceptance:
        at = sum(match >= least for least in _CLASSES) - 1
        return self._classes[max(at, 0)]
