"""Drafts by suffix lookup: the ids that followed the last few ids where the text had them before.

Prompt lookup (Saxena 2023; also in transformers and llama.cpp): an answer that repeats its prompt,
as edits and summaries do, continues as the prompt did.  It costs no rows until drafts are verified.

A copy that is edited breaks off at the new words, and mostly resumes shortly after the place where
it broke off.  There a single matching id is enough to resume it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import mlx.core as mx

from mlx_mtp.drafting.drafter import CommittedStep, Drafter, Drafts
from mlx_mtp.planning.lookup import (
    MAX_LOOKUP_TOKENS,
    MAX_MATCH,
    LookupAcceptance,
)
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import LOOKUP

MIN_MATCH = 2  # ids that must match
MAX_PLACES = 32  # places of a run of ids that are compared, the last ones
MAX_GAP = 16  # ids of the source that an edit may leave out, and ids of its own
_RUNS = (4, MIN_MATCH)  # lengths of indexed runs: common short runs would hide longer matches


@dataclass(frozen=True)
class Match:
    """A match of the text's last ids with earlier ones.

    Attributes:
        tokens: the ids that followed.
        length: how many ids before them are the same, up to ``MAX_MATCH``.
    """

    tokens: list[int]
    length: int

    def num_right(self, emitted: Iterable[int]) -> int:
        """How many of the first tokens equal the emitted ones."""
        same = (ours == theirs for ours, theirs in zip(self.tokens, emitted, strict=False))
        return sum(takewhile(bool, same))


class LookupDrafter(Drafter):
    """Proposes what followed the text's last ids before.

    Args:
        ids: the text.
        acceptance: acceptance of looked-up ids in general, which keeps learning.

    Attributes:
        match: the proposal.
    """

    source = LOOKUP

    def __init__(self, ids: Sequence[int], acceptance: LookupAcceptance) -> None:
        self._text = SuffixLookup(ids)
        self._acceptance = acceptance.in_text()
        self.match = self._text.find(MAX_LOOKUP_TOKENS)

    def offer(self, room: int) -> Offer:
        """The ids after the match."""
        count, length = min(len(self.match.tokens), room), self.match.length
        if not count:
            return Offer(LOOKUP, 0)
        return Offer(LOOKUP, count, self._acceptance.prefix_probs(length, count))

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """The first ids after the match."""
        tokens = self.match.tokens[:count]
        return replace(Drafts.certain(mx.array(tokens, mx.int32)), host_ids=tokens)

    def commit(self, step: CommittedStep) -> None:
        """Judge the match by the emitted ids, add them to the text and look up what may follow."""
        if not step.tokens:
            return
        num_judged = min(len(step.tokens), len(self.match.tokens))
        self._acceptance.observe(self.match.length, num_judged, self.match.num_right(step.tokens))
        self._text.extend(step.tokens)
        self.match = self._text.find(MAX_LOOKUP_TOKENS)


class SuffixLookup:
    """Finds the earlier places of a text's last ids."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._source = self._end = 0  # the last copy: ids[_end:] repeat, or repeated, ids[_source:]
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids to the text."""
        for token in ids:
            end = len(self._ids)
            for size in _RUNS:
                if end >= size:  # these ids are followed by ``token``
                    self._places.setdefault(tuple(self._ids[-size:]), []).append(end)
            self._ids.append(token)

    def find(self, max_tokens: int) -> Match:
        """The longest match; one without tokens where nothing matches.

        Of several equally long ones it is the first one after the place where the last copy broke
        off, else the last one in the text.  Tokens that reach the end of the text repeat.
        """
        end = len(self._ids)
        place, match = self._elsewhere()
        near, near_match = self._near()
        if near_match >= max(match, 1):
            place, match = near, near_match
        if match >= MIN_MATCH:  # a shorter one is no copy, and must not replace the last one
            self._source, self._end = place, end
        tokens = self._ids[place : place + max_tokens]
        while tokens and len(tokens) < max_tokens:
            tokens += tokens[: max_tokens - len(tokens)]
        return Match(tokens, match)

    def _elsewhere(self) -> tuple[int, int]:
        """The last place of the longest match, and its length."""
        for size in _RUNS:
            if places := self._places.get(tuple(self._ids[-size:])):
                return self._longest(reversed(places[-MAX_PLACES:]))
        return self._longest(())

    def _near(self) -> tuple[int, int]:
        """The same among the places where the last copy may resume, the first of them."""
        ids, end = self._ids, len(self._ids)
        while self._end < end and ids[self._source] == ids[self._end]:
            self._source, self._end = self._source + 1, self._end + 1
        if not self._source or end - self._end > MAX_GAP:
            return self._longest(())
        return self._longest(range(self._source, min(self._source + MAX_GAP + 1, end)))

    def _longest(self, places: Iterable[int]) -> tuple[int, int]:
        """The first place of the longest match, and its length; the text's end without any."""
        best, match = len(self._ids), 0
        for place in places:
            length = self._match(place)
            if length > match:
                best, match = place, length
            if match == MAX_MATCH:
                break
        return best, match

    def _match(self, place: int) -> int:
        """Ids before ``place`` that equal the text's last ones, up to ``MAX_MATCH``."""
        ids, end, length = self._ids, len(self._ids), 0
        limit = min(MAX_MATCH, place)
        while length < limit and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length
