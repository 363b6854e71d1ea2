"""Suffix lookup against a slow search, copies that are taken up again, and what is learnt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.drafting.lookup import MAX_GAP, MAX_PLACES, Match, SuffixLookup
from mlx_mtp.planning.lookup import MAX_MATCH, LookupAcceptance


def same_before(ids: list[int], place: int) -> int:
    """Ids before ``place`` that equal the last ones."""
    pairs = zip(reversed(ids[:place]), reversed(ids), strict=False)
    return min(
        MAX_MATCH, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    )


def going_round(ids: list[int], place: int, most: int) -> list[int]:
    """What follows ``place``; behind the last id it begins at ``place`` again."""
    return list(itertools.islice(itertools.cycle(ids[place:]), most)) if place < len(ids) else []


class Slowly:
    """The same by looking everywhere, from the words of ``SuffixLookup.find``."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.copy: tuple[int, int] | None = None  # the place last found, and the text's length then

    def find(self, most: int) -> Match:
        end = len(self.ids)
        lengths = {place: same_before(self.ids, place) for place in range(1, end)}
        near = [place for place in self.leads_to() if lengths[place]]
        best = max((length for length in lengths.values() if length >= 2), default=0)
        match = max([best, *(lengths[place] for place in near)], default=0)
        if not match:
            return Match([], 0)
        following = [place for place in near if lengths[place] == match]
        place = following[0] if following else max(p for p in lengths if lengths[p] == match)
        if match >= 2:
            self.copy = place, end
        return Match(going_round(self.ids, place, most), match)

    def leads_to(self) -> range:
        """Places where the last copy may go on."""
        end = len(self.ids)
        if self.copy is None:
            return range(0)
        place, since = self.copy
        while since < end and self.ids[place] == self.ids[since]:
            place, since = place + 1, since + 1
        return range(place, min(place + MAX_GAP + 1, end)) if end - since <= MAX_GAP else range(0)


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=6).filter(
        lambda parts: sum(map(len, parts)) <= MAX_PLACES + 1
    ),
    st.integers(1, 8),
)
def test_finds_what_a_slow_search_finds(parts: list[list[int]], most: int) -> None:
    text, slowly = SuffixLookup(), Slowly()
    for part in parts:
        text.extend(part)
        slowly.ids += part
        assert text.find(most) == slowly.find(most)


@given(st.lists(st.integers(0, 9), max_size=300), st.integers(1, 30), st.integers(1, 40))
def test_what_it_finds_stood_behind_the_same_ids(ids: list[int], most: int, stride: int) -> None:
    text = SuffixLookup()
    for start in range(0, len(ids), stride):
        text.extend(ids[start : start + stride])
        known, found = ids[: start + stride], text.find(most)
        places = [p for p in range(1, len(known)) if same_before(known, p) >= found.length]
        if found.length:
            assert any(going_round(known, place, most) == found.tokens for place in places)
        else:
            assert not found.tokens


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


class TestAcceptance:
    def test_longer_matches_hold_more_often(self):
        text = LookupAcceptance().in_text()
        firsts = [text.prefix_probs(match, 3)[1] for match in (1, 3, 12, 99)]
        assert firsts == sorted(set(firsts))
        holds = text.prefix_probs(3, 3)
        assert holds == pytest.approx([1, 0.4, 0.4 * 0.5, 0.4 * 0.5 * 0.5])

    @given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 24))))
    def test_chances_stay_chances(self, steps):
        known = LookupAcceptance()
        text = known.in_text()
        for match, judged, right in steps:
            text.observe(match, judged, min(judged, right))
            holds = text.prefix_probs(match, 24)
            assert np.all(np.diff(holds) <= 0)
            assert holds[-1] > 0 and holds[1] < 1

    def test_a_text_is_followed_within_a_few_ids(self):
        text = LookupAcceptance().in_text()
        text.observe(2, 12, 12)
        assert text.prefix_probs(2, 24)[-1] > 0.2
        for _ in range(8):
            text.observe(2, 1, 0)
        assert text.prefix_probs(2, 1)[1] < 0.3

    def test_texts_are_told_apart_and_general_ones_converge(self):
        known, rng = LookupAcceptance(), np.random.default_rng(0)
        for chance in [0.95, 0.05] * 40:
            text = known.in_text()
            for _ in range(15):
                text.observe(3, 1, int(rng.uniform() < chance))
            assert text.prefix_probs(3, 1)[1] == pytest.approx(chance, abs=0.25)
            assert 0.1 < known.in_text().prefix_probs(3, 1)[1] < 0.9

    def test_what_all_texts_show_is_kept(self):
        known = LookupAcceptance()
        for _ in range(60):
            text = known.in_text()
            for _ in range(5):
                text.observe(4, 1, 0)
        assert known.in_text().prefix_probs(4, 1)[1] < 0.2

    def test_right_ids_that_were_all_there_say_nothing_of_the_next(self):
        text = LookupAcceptance().in_text()
        before = text.prefix_probs(1, 1)[1]
        text.observe(1, 0, 0)
        assert text.prefix_probs(1, 1)[1] == before
