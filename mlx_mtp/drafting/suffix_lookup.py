"""Earlier places of a text's last ids, and the ids that followed there.

Two indexes map the last four and the last two ids to the last place that follows the same ids, and
each place to the one before it, like the hash chains of LZ77 compressors.  An id costs half a
microsecond to add, and a search a few microseconds, whatever the length of the text.  A suffix
automaton finds the longest match sooner, but takes three times as long and as much memory to build,
and neither forgets ids nor knows the last places cheaply (docs/log.md).

A text may have parts, such as files and a conversation.  Boundaries between them are ids of their
own, which equal no other, so that neither matches nor proposals cross them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from mlx_mtp.planning.lookup import MAX_MATCH

MIN_MATCH = 2  # ids that must match
MAX_PLACES = 8  # places of a run of ids that are compared, the last ones
MAX_GAP = 16  # ids of the source that an edit may leave out, and ids of its own
_RUNS = (4, MIN_MATCH)  # lengths of indexed runs: common short runs would hide longer matches
_BEGIN = -1  # before the first id; boundaries are smaller


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


class SuffixLookup:
    """Finds the earlier places of a text's last ids.

    A place is the index of an id that follows others.

    Args:
        ids: the text, or its last part.
        sources: parts before it.

    Attributes:
        sources: as given.
    """

    def __init__(self, ids: Iterable[int] = (), *, sources: Sequence[Sequence[int]] = ()) -> None:
        self.sources = sources
        self._ids: list[int] = []
        self._num_boundaries = 0
        self._last: tuple[dict, dict] = ({}, {})  # by length of run: run -> its last place
        self._before: tuple[list[int], list[int]] = ([], [])  # by place: that of the run before
        self._source = self._end = 0  # the last copy: ids[_end:] repeat, or repeated, ids[_source:]
        for source in sources:
            self.extend(source)
            self._add_boundary()
        self._start = len(self._ids)  # of the last part
        self.extend(ids)

    def __len__(self) -> int:
        """Number of ids of the last part."""
        return len(self._ids) - self._start

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids to the text."""
        a, b, c, d = self._run_before(len(self._ids))
        (last4, last2), (before4, before2) = self._last, self._before
        for place, token in enumerate(ids, start=len(self._ids)):
            run = (a, b, c, d)
            before4.append(last4.get(run, 0))
            last4[run] = place
            pair = (c, d)
            before2.append(last2.get(pair, 0))
            last2[pair] = place
            self._ids.append(token)
            a, b, c, d = b, c, d, token

    def truncate(self, length: int) -> None:
        """Remove ids from the end of the last part, down to this many."""
        for place in range(len(self._ids) - 1, self._start + length - 1, -1):
            run = self._run_before(place)
            for size, last, before in zip(_RUNS, self._last, self._before, strict=True):
                if earlier := before.pop():
                    last[run[-size:]] = earlier
                else:
                    del last[run[-size:]]
        del self._ids[self._start + length :]
        self._source = self._end = 0

    def replace(self, ids: Sequence[int]) -> None:
        """Let the last part be these ids."""
        pairs = zip(islice(self._ids, self._start, None), ids, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.truncate(shared)
        self.extend(ids[shared:])

    def find(self, max_tokens: int) -> Match:
        """The longest match; one without tokens where nothing matches.

        Of several equally long ones it is the first one after the place where the last copy broke
        off, else the last one in the text.  Tokens that reach the end of the text repeat.
        """
        end = len(self._ids)
        place, match = near, near_match = self._near()
        if near_match < MAX_MATCH:
            place, match = self._elsewhere()
        if near_match >= max(match, 1):
            place, match = near, near_match
        if match >= MIN_MATCH:  # a shorter one is no copy, and must not replace the last one
            self._source, self._end = place, end
        return Match(self._following(place, max_tokens), match)

    def find_after(self, ids: Sequence[int], max_tokens: int) -> Match:
        """What ``find`` would return if these ids were added to the text, which stays as it is."""
        length, copy = len(self), (self._source, self._end)
        self.extend(ids)
        match = self.find(max_tokens)
        self.truncate(length)
        self._source, self._end = copy
        return match

    def _add_boundary(self) -> None:
        """Add an id that equals no other, and is no place."""
        self._num_boundaries += 1
        self._ids.append(_BEGIN - self._num_boundaries)
        for before in self._before:
            before.append(0)

    def _run_before(self, place: int) -> tuple[int, ...]:
        """The four ids before a place."""
        run = self._ids[max(place - _RUNS[0], 0) : place]
        return (*(_BEGIN,) * (_RUNS[0] - len(run)), *run)

    def _following(self, place: int, max_tokens: int) -> list[int]:
        """Ids from a place on, up to the end of its part; those of the last part repeat."""
        tokens = self._ids[place : place + max_tokens]
        if tokens and min(tokens) < _BEGIN:
            return list(takewhile(lambda token: token > _BEGIN, tokens))
        while tokens and len(tokens) < max_tokens:
            tokens += tokens[: max_tokens - len(tokens)]
        return tokens

    def _elsewhere(self) -> tuple[int, int]:
        """The last place of the longest match, and its length; the text's end without any."""
        ids, end = self._ids, len(self._ids)
        run = self._run_before(end)
        for size, last, before in zip(_RUNS, self._last, self._before, strict=True):
            if not (place := last.get(run[-size:], 0)):
                continue
            best, match = place, self._match(place)
            for _ in range(MAX_PLACES - 1):
                place = before[place]
                if not place or match == MAX_MATCH:
                    break
                # Only a longer match can replace the best one, and it has one more id in common.
                if place > match and ids[place - 1 - match] == ids[end - 1 - match]:
                    length = self._match(place)
                    if length > match:
                        best, match = place, length
            return best, match
        return end, 0

    def _near(self) -> tuple[int, int]:
        """The same among the places where the last copy may resume, the first of them."""
        ids, end = self._ids, len(self._ids)
        while self._end < end and ids[self._source] == ids[self._end]:
            self._source, self._end = self._source + 1, self._end + 1
        best, match = end, 0
        if not self._source or end - self._end > MAX_GAP:
            return best, match
        token, last = ids[-1], min(self._source + MAX_GAP, end - 1)
        for place in range(self._source, last + 1):
            if ids[place] < _BEGIN:
                break  # the copied part ends here
            if ids[place - 1] == token and (length := self._match(place)) > match:
                best, match = place, length
        return best, match

    def _match(self, place: int) -> int:
        """Ids before ``place`` that equal the text's last ones, up to ``MAX_MATCH``."""
        ids, end, length = self._ids, len(self._ids), 0
        limit = min(MAX_MATCH, place)
        if ids[place - limit : place] == ids[end - limit :]:
            return limit
        while ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length
