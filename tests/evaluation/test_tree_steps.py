"""Steps of trees counted on texts: as many as a decode takes."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation.tree_steps import MaskStates, best_chain_steps, tree_steps
from mlx_mtp.planning.auto import Speculation
from tests.helpers.tiny import tiny_mtp

PROMPT = [3, 14, 15, 9, 26, 5]


@pytest.mark.parametrize("lookup", [False, True])
def test_a_text_has_as_many_steps_as_its_decode(lookup: bool) -> None:
    model = tiny_mtp("llama")
    k = model.num_draft_tokens
    num_accepted = 0
    for max_rows in (4, 16):
        steps = list(
            decode(
                model, PROMPT, layout="tree", max_rows=max_rows, max_tokens=30, lookup=lookup,
                speculation=Speculation.guess(k),
            )
        )  # fmt: skip
        ids = [*PROMPT, *(token for step in steps for token in step.tokens)]
        states = MaskStates(model, ids, first=len(PROMPT))
        found = tree_steps(states, Speculation.guess(k), max_rows=max_rows, lookup=lookup)
        assert found == len(steps)
        num_accepted += sum(step.num_accepted for step in steps)
    assert num_accepted > 0


def test_chains_of_a_few_rows_take_the_steps_of_their_policy() -> None:
    counts, probs = np.array([2, 0, 1, 0, 0]), np.array([1.0, 0.9, 0.8])
    # The prompt drafts 2, both accepted; 7 rows verify 2 drafts and put masks after each.
    assert best_chain_steps(counts, probs, max_rows=7, num_waiting=2) == 4
    assert best_chain_steps(counts, probs, max_rows=1, num_waiting=0) == 6
