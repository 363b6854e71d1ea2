"""Trees of mask drafts in the loop: the ids of plain decoding, within the rows, from the right masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.drafting.beam import draft_beam
from mlx_mtp.drafting.mask_trees import MaskTreeDrafter
from mlx_mtp.drafting.shortlist import SHORTLIST, shortlisted
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
    rows = {node: drafter.rows(layout, mx.array(node)) for node in range(4)}
    ordinary = layout.num_draft_tokens + 1  # from the last pending row on
    assert rows[0].tolist() == [ordinary, ordinary + 1, ordinary + 2]
    assert rows[1].tolist()[:2] == [ordinary + 3, ordinary + 2]
    assert rows[2].tolist()[:2] == [ordinary + 1, ordinary + 2]
    assert rows[3].tolist()[:1] == [ordinary + 2]


def test_sampled_trees_are_repeatable() -> None:
    model = tiny_mtp("llama")
    from mlx_mtp.decoding.sampling import Sampling

    options = {"layout": "tree", "seed": 3, "sampling": Sampling(temp=1.0)}
    assert ids_of(model, **options)[0] == ids_of(model, **options)[0]
