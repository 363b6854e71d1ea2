"""One pass of the head over all rows of a step, or two over some: whichever takes less time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_mtp.decoding.batching import has_one_pass
from mlx_mtp.model.layout import linear_layout, plain_layout
from mlx_mtp.planning.costs import CPU_GUESS, GPU_GUESS, is_one_pass_cheaper

FLAT = np.array([0.0, *[1.0] * 32])  # rows are free, as on a GPU up to its limit
LINEAR = np.arange(33.0)  # every row costs as much, as without a fast BLAS


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_where_rows_are_free_there_is_one_pass(share: float) -> None:
    assert is_one_pass_cheaper(FLAT, verified=5, drafted=4, num_rows=25, share=share)


def test_where_rows_cost_alike_unused_mask_rows_are_left_out() -> None:
    rows = {"verified": 3, "drafted": 2}
    assert is_one_pass_cheaper(LINEAR, **rows, num_rows=5, share=1.0)
    assert not is_one_pass_cheaper(LINEAR, **rows, num_rows=6, share=1.0)
    assert not is_one_pass_cheaper(LINEAR, **rows, num_rows=5, share=0.5)


@pytest.mark.parametrize("curve", [CPU_GUESS, GPU_GUESS])
def test_a_draft_vocabulary_makes_a_second_pass_pay_earlier(curve: object) -> None:
    ms = curve.forward(0)  # type: ignore[attr-defined]

    def longest(share: float) -> int:
        counts = range(9, 200)
        rows = {"verified": 5, "drafted": 4, "share": share}
        return next(n for n in counts if not is_one_pass_cheaper(ms, **rows, num_rows=n))

    assert 9 <= longest(0.17) < longest(1.0) < 40


def test_any_step_of_a_batch_knows_the_costs() -> None:
    model: Any = SimpleNamespace(frequent=None, vocab_size=64)
    drafting = linear_layout(num_pending=1, num_draft_tokens=2, num_masks=2)
    layouts = [plain_layout(), drafting]
    assert has_one_pass(model, layouts, [None, FLAT])
    assert not has_one_pass(model, layouts, [None, None])
    assert has_one_pass(model, layouts[:1], [None])  # there is nothing to decide
