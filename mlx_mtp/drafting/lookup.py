"""Drafts by suffix lookup: what followed the last few ids when they stood in the text before.

Prompt lookup (Saxena 2023; also in transformers and llama.cpp): answers that repeat their prompt,
as edits and summaries do, go on as the prompt went on.  It costs no rows until drafts are verified.

A copy that is edited breaks off at the words that are new, and mostly goes on a little behind the
place where it broke off.  There a single id that stands again is enough to take it up.

What is looked up is judged by the text as it comes, verified or not, so learning costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

SHORTEST, LONGEST = 2, 32  # ids that must match, and that are looked at
LONGEST_LOOKUP = 24  # drafts of one lookup
LOOKED_AT = 32  # places of a run of ids, the last ones
NEAR = 16  # ids of the source that an edit may leave out, and ids of its own
_RUNS = (4, SHORTEST)  # ids by which places are found: common short runs would hide longer matches
_CLASSES = (1, 2, 3, 4, 6, 10, 16, 32)  # matches of such lengths, up to the next, are alike
_PRIOR = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Observations count by what they tell, chance * (1 - chance): a quarter at most.
_PRIOR_WEIGHT = 40.0  # observations that the prior stands for
_MOST_WEIGHT = 40.0  # of a class; more would be slow to follow
_TEXT_WEIGHT, _MOST_TEXT_WEIGHT = 0.4, 2.0  # of no shift, and of what a text has shown
_CLASS_OF = np.searchsorted(_CLASSES, np.arange(LONGEST + 1), side="right") - 1


@dataclass(frozen=True)
class Found:
    """Drafts that were looked up.

    Attributes:
        tokens: what followed.
        match: how many ids before it were the same, up to ``LONGEST``.
    """

    tokens: list[int]
    match: int

    def num_right(self, emitted: Iterable[int]) -> int:
        """How many of the first tokens are what was emitted."""
        same = (ours == theirs for ours, theirs in zip(self.tokens, emitted, strict=False))
        return sum(takewhile(bool, same))


class SuffixLookup:
    """Finds earlier places of the text's last ids."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._source = self._end = 0  # ids[_end:] go on, or broke off, as ids[_source:]
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids to the text."""
        for token in ids:
            end = len(self._ids)
            for size in _RUNS:
                if end >= size:  # what stands before ``token`` is followed by it
                    self._places.setdefault(tuple(self._ids[-size:]), []).append(end)
            self._ids.append(token)

    def find(self, most: int) -> Found:
        """What followed the longest match; no tokens without any.

        Of several alike long it is the first one behind where the last copy broke off, else the
        last one in the text.  Where the text runs into itself it goes round.
        """
        end = len(self._ids)
        place, match = self._elsewhere()
        near, near_match = self._near()
        if near_match >= max(match, 1):
            place, match = near, near_match
        if match >= SHORTEST:  # less is no copy yet, and if it fails the old one should be known
            self._source, self._end = place, end
        tokens = self._ids[place : place + most]
        while tokens and len(tokens) < most:
            tokens += tokens[: most - len(tokens)]
        return Found(tokens, match)

    def _elsewhere(self) -> tuple[int, int]:
        """The last place of the longest match, and its length."""
        for size in _RUNS:
            if places := self._places.get(tuple(self._ids[-size:])):
                return self._longest(reversed(places[-LOOKED_AT:]))
        return self._longest(())

    def _near(self) -> tuple[int, int]:
        """The same among the places that the last copy leads to, the first of them."""
        ids, end = self._ids, len(self._ids)
        while self._end < end and ids[self._source] == ids[self._end]:
            self._source, self._end = self._source + 1, self._end + 1
        if not self._source or end - self._end > NEAR:
            return self._longest(())
        return self._longest(range(self._source, min(self._source + NEAR + 1, end)))

    def _longest(self, places: Iterable[int]) -> tuple[int, int]:
        """The first place of the longest match, and its length; the text's end without any."""
        best, match = len(self._ids), 0
        for place in places:
            length = self._match(place)
            if length > match:
                best, match = place, length
            if match == LONGEST:
                break
        return best, match

    def _match(self, place: int) -> int:
        """Ids before ``place`` that equal the text's last ones, up to ``LONGEST``."""
        ids, end, length = self._ids, len(self._ids), 0
        most = min(LONGEST, place)
        while length < most and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length


class LookupAcceptance:
    """How looked-up ids hold in general, by the length of the match.

    Behind ids that hold the match is longer by them, so one table tells how all of them do.

    Attributes:
        logits: log-odds that one id holds if those before it do, by class of length.
        weights: what is known of each.
    """

    def __init__(self) -> None:
        self.logits = [math.log(chance / (1 - chance)) for chance in _PRIOR]
        self.weights = [_PRIOR_WEIGHT * chance * (1 - chance) for chance in _PRIOR]

    def in_text(self) -> TextAcceptance:
        """The same for a text that begins."""
        return TextAcceptance(self)


class TextAcceptance:
    """How looked-up ids hold in one text, beside others.

    Texts differ: an edit repeats its prompt, a chat uses some of its words.  So a text has a shift
    of all log-odds, and the general ones are those of a text without (a logistic regression with
    a random effect, fitted one observation at a time).

    Args:
        general: of all texts; it goes on learning.
    """

    def __init__(self, general: LookupAcceptance) -> None:
        self._general = general
        self._shift, self._weight = 0.0, _TEXT_WEIGHT

    def holds(self, match: int, num_draft_tokens: int) -> np.ndarray:
        """Chance that at least j drafts hold, ``[drafts + 1]``."""
        chances = 1 / (1 + np.exp(-self._shift - np.array(self._general.logits)))
        lengths = np.minimum(match + np.arange(num_draft_tokens), LONGEST)
        return np.concatenate([[1.0], np.cumprod(chances[_CLASS_OF[lengths]])])

    def observe(self, match: int, num_judged: int, num_right: int) -> None:
        """Count looked-up ids of which the first ``num_right`` were right."""
        logits, weights = self._general.logits, self._general.weights
        for each in range(min(num_judged, num_right + 1)):
            at = int(_CLASS_OF[min(match + each, LONGEST)])
            chance = 1 / (1 + math.exp(-self._shift - logits[at]))
            error, weight = (each < num_right) - chance, chance * (1 - chance)
            self._weight = min(self._weight + weight, _MOST_TEXT_WEIGHT)
            weights[at] = min(weights[at] + weight, _MOST_WEIGHT)
            self._shift += error / self._weight
            logits[at] += error / weights[at]
