"""The exponentials of the CPU back-end: values, limits and gradients, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.backends.cpu import fast_math
from mlx_mtp.backends.cpu.blocks import FastMLP, MaskBiases, replace_blocks
from mlx_mtp.model.attention import AttentionSeam
from tests.helpers.tiny import KINDS, tiny_base


def rows(*shape: int, seed: int = 0, spread: float = 3.0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * spread


def exact(x: mx.array) -> np.ndarray:
    return np.array(x, np.float64)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bound", [1.0, 8.0, 87.0])
def test_exp_is_right_to_its_bound(bound, compiled):
    x = mx.linspace(-bound, bound, 200_001)
    found = exact((mx.compile(fast_math.exp) if compiled else fast_math.exp)(x))
    wanted = np.exp(exact(x))
    allowed = 4e-7 + 1e-7 * np.abs(exact(x))
    assert (np.abs(found / wanted - 1) <= allowed).all()


def test_exp_at_its_limits():
    x = mx.array([-mx.inf, -200.0, -88.5, 0.0, 89.0, mx.inf, mx.nan])
    found: Any = fast_math.exp(x).tolist()
    assert found[:6] == [0.0, 0.0, 0.0, 1.0, float("inf"), float("inf")]
    assert np.isnan(found[6])


def test_what_is_masked_has_no_weight_at_all():
    x = mx.array([[0.5, -mx.inf, 1.0, -mx.inf]])
    assert fast_math.softmax(x)[0, 1::2].tolist() == [0.0, 0.0]
    alone = fast_math.softmax(x[:, ::2])
    assert mx.array_equal(fast_math.softmax(x)[:, ::2], alone)


@pytest.mark.parametrize("shape", [(4, 7), (41, 50_001), (1, 5)])
def test_logsumexp_and_its_gradient(shape):
    x, weights = rows(*shape), rows(shape[0], seed=1)
    wanted = np.log(np.exp(exact(x)).sum(-1))
    assert np.allclose(exact(fast_math.logsumexp(x)), wanted, rtol=2e-5)  # MLX's sums
    gradient = mx.grad(lambda x: (fast_math.logsumexp(x) * weights).sum())(x)
    softmax = np.exp(exact(x) - wanted[:, None])
    assert np.allclose(exact(gradient), softmax * exact(weights)[:, None], rtol=3e-4, atol=1e-9)


def test_softmax_and_its_gradient():
    x, weights = rows(2, 3, 4, 9), rows(2, 3, 4, 9, seed=1)
    assert np.allclose(fast_math.softmax(x), mx.softmax(x, axis=-1), atol=1e-6)
    ours = mx.grad(lambda x: (fast_math.softmax(x) * weights).sum())(x)
    mlx = mx.grad(lambda x: (mx.softmax(x, axis=-1) * weights).sum())(x)
    assert np.allclose(ours, mlx, atol=1e-6)


def test_swiglu_and_its_gradients():
    gate, up, weights = rows(5, 8), rows(5, 8, seed=1), rows(5, 8, seed=2)
    assert np.allclose(fast_math.swiglu(gate, up), nn.silu(gate) * up, atol=1e-5)
    assert fast_math.swiglu(mx.array([-1e4, 1e4]), mx.ones(2)).tolist() == [0.0, 1e4]

    def gradients(function: Any) -> list[mx.array]:
        return mx.grad(lambda *x: (function(*x) * weights).sum(), argnums=[0, 1])(gate, up)

    for ours, mlx in zip(
        gradients(fast_math.swiglu), gradients(lambda gate, up: nn.silu(gate) * up), strict=True
    ):
        assert np.allclose(ours, mlx, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_common_blocks_are_replaced(name):
    base = tiny_base(name)
    ids = mx.array([[1, 5, 9, 2, 7]])
    before = base(ids)
    replace_blocks(base)
    kinds = {type(block) for layer in base.layers for block in layer.children().values()}
    assert {AttentionSeam, FastMLP} <= kinds
    assert np.allclose(base(ids), before, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_no_model_changes(name):
    base = tiny_base(name)
    ids = mx.array([[1, 5, 9, 2, 7, 3, 3, 8, 4]])
    before = base(ids)
    alone = base(ids[:, :1])  # latent attention has another form for one row
    replace_blocks(base)
    assert np.allclose(base(ids), before, atol=1e-4 * float(mx.abs(before).max()))
    assert np.allclose(base(ids[:, :1]), alone, atol=1e-4 * float(mx.abs(alone).max()))


def test_a_block_that_computes_something_else_is_left_alone():
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
            self.down_proj = nn.Linear(8, 4)

        def __call__(self, x: mx.array) -> mx.array:
            return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Other()

    model = Model()
    replace_blocks(model)
    assert type(model.mlp) is Other


def test_masks_of_every_kind_become_the_same_numbers():
    biases, scores = MaskBiases(), mx.zeros((2, 3))
    sees = mx.array([[True, True, False], [True, True, True]])
    wanted = [[0.0, 0.0, -float("inf")], [0.0, 0.0, 0.0]]
    assert biases.of("causal", scores).tolist() == wanted
    assert biases.of(sees, scores).tolist() == wanted
    assert biases.of(mx.array(wanted), scores).tolist() == wanted
