"""Suffix lookup against a slow search, parts of a text, and copies that are resumed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.drafting.suffix_lookup import MAX_GAP, MAX_PLACES, Match, SuffixLookup
from mlx_mtp.planning.lookup import MAX_MATCH

Parts = list[list[int]]
texts = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=8)


def same_at_end(one: list[int], other: list[int]) -> int:
    """How many of their last ids are the same, as far as they are compared."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return min(MAX_MATCH, len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))))


class SlowLookup:
    """The same by comparing whole parts, from the docstrings of ``SuffixLookup``."""

    def __init__(self, sources: Parts | None = None) -> None:
        self.parts: Parts = [*(sources or []), []]
        self.copy: tuple[int, int, int] | None = None  # part and place found, and the length then

    @property
    def ids(self) -> list[int]:
        """The last part."""
        return self.parts[-1]

    def matches(self) -> dict[tuple[int, int], int]:
        """Lengths of the matches of all places that have a token, by part and place."""
        return {
            (number, place): same_at_end(part[:place], self.ids)
            for number, part in enumerate(self.parts)
            for place in range(len(part))
        }

    def find(self, max_tokens: int) -> Match:
        lengths = self.matches()
        near = [place for place in self.near() if lengths[place]]
        elsewhere: list[tuple[int, int]] = []
        for size in (2, 4):  # the longer run of ids counts if it occurs
            places = [place for place, length in lengths.items() if length >= size]
            elsewhere = places[-MAX_PLACES:] or elsewhere
        match = max((lengths[place] for place in [*elsewhere, *near]), default=0)
        if not match:
            return Match([], 0)
        resumed = [place for place in near if lengths[place] == match]
        number, place = (resumed or [place for place in elsewhere if lengths[place] == match][-1:])[
            0
        ]
        if match >= 2:
            self.copy = number, place, len(self.ids)
        tokens = self.parts[number][place:]
        repeats = itertools.cycle(tokens) if number == len(self.parts) - 1 else tokens
        return Match(list(itertools.islice(repeats, max_tokens)), match)

    def near(self) -> list[tuple[int, int]]:
        """Places where the last copy may resume."""
        if self.copy is None:
            return []
        number, place, end = self.copy
        part = self.parts[number]
        while end < len(self.ids) and place < len(part) and part[place] == self.ids[end]:
            place, end = place + 1, end + 1
        if len(self.ids) - end > MAX_GAP:
            return []
        return [(number, p) for p in range(place, min(place + MAX_GAP + 1, len(part)))]


@given(texts, texts, st.integers(1, 8))
def test_finds_what_a_slow_search_finds(sources: Parts, answer: Parts, max_tokens: int) -> None:
    text, slow = SuffixLookup(sources=sources), SlowLookup(sources)
    for ids in answer:
        text.extend(ids)
        slow.ids.extend(ids)
        assert text.find(max_tokens) == slow.find(max_tokens)


@given(texts, texts, st.lists(st.integers(0, 3), max_size=9), st.integers(1, 8))
def test_looks_up_what_would_follow_more_ids(
    sources: Parts, answer: Parts, more: list[int], max_tokens: int
) -> None:
    text = SuffixLookup(sources=sources)
    for number, ids in enumerate(answer):
        text.extend(ids)
        copy, expected = SuffixLookup(sources=sources), Match([], 0)
        for earlier in answer[: number + 1]:
            copy.extend(earlier)
            expected = copy.find(max_tokens)
        copy.extend(more)
        # After the ids of each step: a search moves the copy that may be resumed.
        assert text.find(max_tokens) == expected
        assert text.find_after(more, max_tokens) == copy.find(max_tokens)
        assert text.find(max_tokens) == expected


@given(st.lists(st.integers(0, 9), max_size=300), st.integers(1, 30), st.integers(1, 40))
def test_what_it_finds_followed_the_same_ids(ids: list[int], most: int, stride: int) -> None:
    text = SuffixLookup()
    for start in range(0, len(ids), stride):
        text.extend(ids[start : start + stride])
        known, match = ids[: start + stride], text.find(most)
        places = [p for p in range(1, len(known)) if same_at_end(known[:p], known) >= match.length]
        repeated = [list(itertools.islice(itertools.cycle(known[p:]), most)) for p in places]
        assert match.tokens in repeated if match.length else not match.tokens


def test_neither_matches_nor_proposals_cross_a_boundary() -> None:
    text = SuffixLookup([3, 4], sources=[[1, 2], [3, 4, 5], [6, 7]])
    assert text.find(9) == Match([5], 2)  # not 6, which begins another part
    text.extend([5])
    assert text.find(9) == Match([], 0)  # the place after it is the part's end
    assert SuffixLookup([2, 3, 1, 2, 3], sources=[[1, 2]]).find(2) == Match([1, 2], 2)
    assert SuffixLookup([9, 2, 3], sources=[[1, 9], [2, 3, 4]]).find(1) == Match([4], 2)
    assert SuffixLookup([], sources=[[1, 2, 1, 2]]).find(3) == Match([], 0)


def test_a_copy_is_not_resumed_in_the_next_part() -> None:
    text = SuffixLookup([1, 2], sources=[[1, 2, 3], [8, 9]])
    assert text.find(1).tokens == [3]
    text.extend([8])
    assert not text.find(1).tokens


def test_the_longest_match_wins_and_of_several_the_last() -> None:
    text = SuffixLookup([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 8, 1, 2, 3, 4])
    assert text.find(3) == Match([5, 9, 2], 4)
    assert SuffixLookup([1, 2, 5, 1, 2, 6, 1, 2]).find(1) == Match([6], 2)
    assert SuffixLookup([1, 2, 3]).find(3) == SuffixLookup().find(3) == Match([], 0)


def test_a_long_match_is_not_hidden_by_many_short_ones() -> None:
    noise = [each for at in range(2 * MAX_PLACES) for each in (50 + at % 7, 1, 2)]
    assert SuffixLookup([3, 4, 1, 2, 99, *noise, 3, 4, 1, 2]).find(1) == Match([99], 4)


def test_text_that_runs_into_itself_goes_round() -> None:
    assert SuffixLookup([7, 7, 7]).find(5).tokens == [7] * 5
    assert SuffixLookup([1, 2, 3, 1, 2, 3, 1]).find(7).tokens == [2, 3, 1, 2, 3, 1, 2]


SOURCE = list(range(10, 50))


@pytest.mark.parametrize(
    ("edited", "behind"),
    [
        ([10, 11, 12, 13, 90, 15], 16),  # one id for another
        ([10, 11, 12, 13, 90, 91, 92, 17], 18),  # three ids for three
        ([10, 11, 12, 13, 20], 21),  # six are left out
        ([10, 11, 12, 13, 90, 91, 14], 15),  # two are put in
        ([10, 11, 12, 13, 90, 13], 14),  # put in with the same end, as in a list
    ],
)
def test_an_edited_copy_is_taken_up_by_one_id(edited: list[int], behind: int) -> None:
    text = SuffixLookup([*SOURCE, 1])
    for token in edited[:-1]:
        text.extend([token])
        text.find(9)
    text.extend(edited[-1:])
    assert text.find(4) == Match(list(range(behind, behind + 4)), 1)


def test_nothing_is_taken_up_far_behind_or_without_a_copy() -> None:
    text = SuffixLookup([*SOURCE, 1, 10, 11])
    assert text.find(2).tokens == [12, 13]
    text.extend([12 + MAX_GAP + 1])
    assert not text.find(2).tokens
    text = SuffixLookup([*SOURCE, 1, 10, 11])
    text.find(2)
    text.extend([90] * (MAX_GAP + 1))
    text.extend([14])
    assert text.find(2).length < 1
    assert not SuffixLookup([*SOURCE, 1, 14]).find(2).tokens  # one id is no copy


def test_a_copy_goes_on_though_others_are_later() -> None:
    line, end = [1, 2, 3, 4], [8, 9]
    text = SuffixLookup([*line, 5, 6, 7, *end, *line, 70, *end, 0, 1, 2, 3])
    text.find(3)  # both lines are alike so far, the later one is taken
    text.extend([4, 5])
    assert text.find(2) == Match([6, 7], 5)
    text.extend([60, 8])  # of the two ends the one behind this line
    assert text.find(3).tokens == [9, 1, 2]


def test_how_many_were_right() -> None:
    found = Match([1, 2, 3, 4], 5)
    assert [found.num_right(ids) for ids in ([], [1], [1, 2, 9, 4], [9, 2], [1, 2, 3, 4, 5])] == [
        0, 1, 2, 0, 4,
    ]  # fmt: skip
