"""The text that drafts are looked up in, what is offered, and what is learnt about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.drafting.lookup import LookupDrafter, text_of
from mlx_mtp.drafting.suffix_lookup import SuffixLookup
from mlx_mtp.planning.lookup import LookupAcceptance


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


def cache_at(offset: int, memory: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(offset=offset, drafter_memory={} if memory is None else memory)


class TestText:
    def test_a_conversation_is_continued(self):
        cache = cache_at(0)
        text = text_of(cache, [1, 2, 3], num_prompt=3)
        text.extend([4, 5, 6])  # the last two were cut, the one before is not in the cache
        cache.offset = 3
        again = text_of(cache, [4, 7, 2], num_prompt=3)
        assert again is text and again.find(2).tokens == []
        again.extend([3])
        assert again.find(4).tokens == [4, 7, 2, 3] and len(again) == 7

    def test_known_ids_replace_what_is_remembered(self):
        cache = cache_at(0)
        text_of(cache, [1, 2, 3, 4, 5], num_prompt=5).extend([6, 7])
        cache.offset = 3
        text = text_of(cache, [1, 2, 9, 8, 1, 2], num_prompt=3)
        assert text.find(2).tokens == [9, 8] and len(text) == 6

    def test_what_is_neither_known_nor_remembered_is_left_out(self):
        for memory in ({}, {"lookup": SuffixLookup([5, 6])}):
            text = text_of(cache_at(3, memory), [1, 2, 7, 1, 2], num_prompt=5)
            assert len(text) == 5 and text.find(1).tokens == [7]

    def test_other_files_make_another_text(self):
        cache = cache_at(0)
        first = text_of(cache, [1, 2], num_prompt=2, sources=[[1, 2, 3]])
        assert first.find(9).tokens == [3]
        assert text_of(cache, [1, 2], num_prompt=2, sources=[[1, 2, 3]]) is first
        assert text_of(cache, [1, 2], num_prompt=2, sources=[[1, 2, 4]]).find(9).tokens == [4]
        assert text_of(cache, [1, 2], num_prompt=2).find(9).tokens == []

    @given(
        st.lists(st.integers(0, 2), max_size=20),
        st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=5),
    )
    def test_a_text_with_other_ids_is_as_a_new_one(self, source, texts):
        text = SuffixLookup(sources=[source])
        for ids in texts:
            text.replace(ids)
            new = SuffixLookup(ids, sources=[source])
            assert len(text) == len(ids) and text.find(5) == new.find(5)
            for token in (0, 1, 2):
                assert text.find_after([token], 5) == new.find_after([token], 5)


def test_an_offer_is_what_the_room_allows():
    text = SuffixLookup([1, 2, 3, 4, 5, 1, 2])
    drafter = LookupDrafter(text, LookupAcceptance())
    offer = drafter.offer(3)
    assert (offer.source, offer.num_drafts) == ("lookup", 3)
    assert offer.prefix_probs is not None and len(offer.prefix_probs) == 4
    drafts = drafter.propose(2, key=mx.random.key(0))
    assert drafts.ids() == [3, 4] and drafts.tokens.tolist() == [3, 4]
    assert drafts.probs.tolist() == [[1.0], [1.0]]
    assert drafter.offer(0).num_drafts == 0
    assert LookupDrafter(SuffixLookup([1, 2, 3]), LookupAcceptance()).offer(9).num_drafts == 0
