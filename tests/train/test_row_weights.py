"""Weights of mask rows in the loss, against PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_mtp.evaluation.forward import draft_states, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.losses import (
    Targets,
    _cross_entropy,
    _head,
    loss_terms,
    make_targets,
    row_weights,
    total_loss,
)
from mlx_mtp.train.settings import REACH, LossWeights, TrainSettings
from tests.helpers.tiny import tiny_mtp

torch = pytest.importorskip("torch")

ROWS = MaskRows((2, 5, 9, 12, 15), (4, 1, 3, 4, 2))


def reference(losses: np.ndarray, rows: MaskRows) -> dict[str, np.ndarray]:
    """Reach by the definition; chain as the gradient of the expected number of accepted drafts."""
    log_q = torch.tensor(-losses.astype(np.float64), requires_grad=True)
    reach, expected, start = [], torch.zeros((), dtype=torch.float64), 0
    for count in rows._counts.tolist():
        q = log_q[start : start + count].exp()
        reach += [float(q[:place].detach().prod()) for place in range(count)]
        expected = expected + q.cumprod(0).sum()
        start += count
    expected.backward()
    parts = {"base": np.array(reach), "sampler": log_q.grad.numpy()}
    return {name: 0.5 + 0.5 * part / part.mean() for name, part in parts.items()}


@given(
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_are_those_of_the_formulas(counts: list[int], seed: int, spread: float) -> None:
    rows = MaskRows(tuple(range(len(counts))), tuple(counts))
    losses = np.random.default_rng(seed).exponential(spread, rows.num_rows).astype(np.float32)
    weights, wanted = row_weights(mx.array(losses), rows), reference(losses, rows)
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        assert np.allclose(value, wanted[name], rtol=2e-5, atol=1e-6), name
        assert float(np.array(value).mean()) == pytest.approx(1, rel=1e-5)


def test_stay_finite_where_no_draft_is_likely() -> None:
    for value in row_weights(mx.full((ROWS.num_rows,), 500.0), ROWS).values():
        assert np.isfinite(np.array(value)).all() and (np.array(value) >= 0.5).all()


def row_losses(model: MTPModel, targets: Targets, hidden: mx.array) -> dict[str, mx.array]:
    head = _head(model, hidden, targets, 0)
    losses = {"base": _cross_entropy(head, hidden, targets)}
    if model.sampler_head is not None:
        state = model.sampler_head(model.embed(targets.previous), hidden)
        losses["sampler"] = _cross_entropy(head, state, targets)
    return losses


@pytest.mark.parametrize("sampler", [True, False])
def test_count_in_the_loss_and_have_no_gradient(sampler: bool) -> None:
    model = tiny_mtp(sampler=sampler)
    ids = mx.array(np.random.default_rng(3).integers(0, 60, 20))
    ordinary = ordinary_rows(model, ids)
    targets = make_targets(model, ordinary, ids, ROWS, teacher="sample")
    before = row_losses(model, targets, draft_states(model, ordinary, ROWS))
    drafted = before["sampler" if sampler else "base"]
    fixed = {name: mx.array(x) for name, x in reference(np.array(drafted), ROWS).items()}

    def wanted() -> mx.array:
        losses = row_losses(model, targets, draft_states(model, ordinary, ROWS))
        return sum((loss * fixed[name]).mean() for name, loss in losses.items())  # type: ignore

    def found() -> mx.array:
        terms = loss_terms(model, ordinary, ROWS, targets, weights=REACH)
        return total_loss(terms, LossWeights(lcm=0.0))

    (value, gradients), (other, others) = (
        nn.value_and_grad(model, loss)() for loss in (found, wanted)
    )
    assert float(np.array(value)) == pytest.approx(float(np.array(other)), rel=1e-5)
    left: Any = dict(tree_flatten(gradients))
    right: Any = dict(tree_flatten(others))
    assert left.keys() == right.keys() and left
    for name, gradient in left.items():
        scale = max(float(np.abs(right[name]).max()), 1e-6)
        assert np.allclose(gradient, right[name], rtol=0, atol=1e-4 * scale), name


def test_leave_latent_consistency_alone() -> None:
    model = tiny_mtp()
    ids = mx.array(np.random.default_rng(3).integers(0, 60, 20))
    ordinary = ordinary_rows(model, ids)
    targets = make_targets(model, ordinary, ids, ROWS, teacher="sample")
    even = loss_terms(model, ordinary, ROWS, targets)
    reach = loss_terms(model, ordinary, ROWS, targets, weights=REACH)
    assert mx.array_equal(even["lcm"], reach["lcm"])
    assert even["base"].item() != reach["base"].item()
    assert even["sampler"].item() != reach["sampler"].item()


def test_are_refused_where_a_mask_has_no_one_token() -> None:
    with pytest.raises(ValueError, match="row_weights reach needs one target token"):
        TrainSettings(row_weights=REACH, teacher="dist")
    with pytest.raises(ValueError, match="row_weights must be one of even, reach, got 'tv'"):
        TrainSettings(row_weights="tv")
