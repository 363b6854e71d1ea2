"""Trees of mask drafts in the loop: plain ids, within the rows, from the nearest masks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.drafting.mask_trees import MaskTreeDrafter, add_path
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.auto import Speculation
from tests.helpers.tiny import tiny_mtp

PROMPT = [3, 14, 15, 9, 26, 5]


def ids_of(model: Any, **options: Any) -> tuple[list[int], list[Any]]:
    steps = list(decode(model, PROMPT, max_tokens=40, **options))
    return [token for step in steps for token in step.tokens], steps


@pytest.mark.parametrize("max_rows", [1, 2, 5, 16])
def test_trees_emit_the_ids_of_plain_decoding_within_the_rows(max_rows: int) -> None:
    model = tiny_mtp("llama")
    expected, _ = ids_of(model, layout="plain")
    found, steps = ids_of(model, layout="tree", max_rows=max_rows)
    assert found == expected
    assert max(step.num_rows for step in steps[1:]) <= max_rows
    if max_rows >= 5:
        assert any(step.num_draft_tokens for step in steps)


def test_drafts_come_from_the_nearest_masks() -> None:
    model = tiny_mtp("llama")
    drafter = MaskTreeDrafter(model, None, Speculation.guess(model.num_draft_tokens))
    # x_0 and its drafts 1 and 2, and 3 after 1; three masks after x_0 and one after 1
    layout = StepLayout(2, 3, (3, 1, 0, 0), (0, 0, 1))
    rows = [np.array(drafter.rows(layout, mx.array(node))).tolist() for node in range(4)]
    ordinary = layout.num_draft_tokens + 1  # from the last pending row on
    assert rows[0] == [ordinary, ordinary + 1, ordinary + 2]
    assert rows[1][:2] == [ordinary + 3, ordinary + 2]
    assert rows[2][:2] == [ordinary + 1, ordinary + 2]
    assert rows[3][:1] == [ordinary + 2]


def test_sampled_trees_are_repeatable() -> None:
    model = tiny_mtp("llama")
    options = {"layout": "tree", "seed": 3, "sampling": Sampling(temp=1.0)}
    assert ids_of(model, **options)[0] == ids_of(model, **options)[0]


def test_a_looked_up_path_is_merged_with_the_nodes_that_it_shares() -> None:
    ids, parents, probs = [5, 6, 7, 8], [0, 0, 1, 2], [0.6, 0.2, 0.5, 0.5]
    add_path(ids, parents, probs, [6, 9, 3], [0.8, 0.5, 0.9])
    assert ids == [5, 6, 7, 8, 9, 3]
    assert parents == [0, 0, 1, 2, 2, 5]
    # 6 was a node already, and 5 shares what it leaves; 9 becomes a sibling of 8
    assert probs == pytest.approx([0.6 * 0.2 / 0.8, 0.8, 0.5, 0.25, 0.5, 0.9])


def test_a_looked_up_path_that_is_less_likely_changes_nothing() -> None:
    ids, parents, probs = [5, 6], [0, 1], [0.6, 0.5]
    add_path(ids, parents, probs, [5, 6], [0.5, 0.5])
    assert (ids, parents, probs) == ([5, 6], [0, 1], [0.6, 0.5])


def test_repeated_text_is_drafted_by_lookup_too() -> None:
    model = tiny_mtp("llama")
    plain, _ = ids_of(model, layout="plain")
    prompt = [*PROMPT, *plain, *PROMPT]  # the answer is likely to be in the prompt
    options = {"layout": "tree", "max_rows": 12, "max_tokens": 24}
    found = [
        [token for step in decode(model, prompt, lookup=lookup, **options) for token in step.tokens]
        for lookup in (True, False)
    ]
    again = decode(model, prompt, layout="plain", max_tokens=24)
    assert found == 2 * [[token for step in again for token in step.tokens]]
