"""What is learnt about looked-up drafts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
