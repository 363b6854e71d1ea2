"""Float32 twins: right values, and rows that do not depend on how many ride along."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.backends.cpu.blas import BLAS, has_small_matrix_kernels
from mlx_mtp.backends.cpu.float32 import (
    SHARED_SIZE,
    STEP_ROWS,
    UNPACKED_LIMIT,
    ColumnBlocks,
    DenseEmbedding,
    DenseLinear,
    to_float32,
)

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (40, 64), (16, 32)]


def helper_stream():
    return mx.new_thread_local_stream(mx.cpu)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_hold_every_weight_once_and_stay_below_the_packing_limit(shape):
    weight = mx.random.normal(shape, key=mx.random.key(0))
    blocks = ColumnBlocks.of(weight)
    assert blocks is not None
    assert len(blocks.parts) == (2 if weight.size >= SHARED_SIZE else 1)
    for part in blocks.parts:
        assert part.shape[1] * part.shape[2] * STEP_ROWS <= UNPACKED_LIMIT
    rows = mx.concatenate([part.swapaxes(-1, -2).reshape(-1, shape[1]) for part in blocks.parts])
    assert mx.array_equal(rows, weight)


def test_a_weight_that_cannot_be_cut_is_left_alone():
    assert ColumnBlocks.of(mx.zeros((12, 64))) is None  # no multiple of 8 columns
    assert ColumnBlocks.of(mx.zeros((16, 8192))) is None  # 8 columns are too many already


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 25, 26, 60])
def test_products_equal_float64(shape, rows):
    weight = mx.random.normal(shape, key=mx.random.key(1))
    x = mx.random.normal((1, rows, shape[1]), key=mx.random.key(2))
    bias = mx.random.normal((shape[0],), key=mx.random.key(3))
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T + np.array(bias, np.float64)
    scale = np.abs(exact).max()
    y = DenseLinear(weight, bias=bias, helper=helper_stream())(x)
    assert y.shape == (1, rows, shape[0])
    assert np.abs(np.array(y) - exact).max() < 1e-5 * scale
    logits = DenseEmbedding(weight, helper=helper_stream()).as_linear(x)
    assert np.abs(np.array(logits) + np.array(bias) - exact).max() < 1e-5 * scale


@pytest.mark.skipif(not has_small_matrix_kernels(BLAS), reason="needs OpenBLAS with AVX-512")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(shape):
    linear = DenseLinear(mx.random.normal(shape), bias=None, helper=helper_stream())
    x = mx.random.normal((1, STEP_ROWS, shape[1]))
    alone = mx.concatenate([linear(x[:, row : row + 1]) for row in range(STEP_ROWS)], axis=1)
    for rows in range(1, STEP_ROWS + 1):
        assert mx.array_equal(linear(x[:, :rows]), alone[:, :rows]), rows


def test_other_shapes_of_input_take_the_ordinary_road():
    linear = DenseLinear(mx.random.normal((16, 32)), bias=None, helper=helper_stream())
    for shape in [(32,), (5, 32), (3, 4, 32), (1, 2, 3, 32)]:
        x = mx.random.normal(shape)
        assert mx.allclose(linear(x), x @ linear.weight.T, atol=1e-5)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.linear = nn.Linear(32, 48, bias=True)
        self.norm = nn.RMSNorm(32)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_become_what_their_numbers_say(bits):
    layers = Layers()
    layers.set_dtype(mx.float16)
    nn.quantize(layers, group_size=32, bits=bits)
    packed = {"linear": layers.linear, "embedding": layers.embedding}
    exact = {
        name: mx.dequantize(
            layer.weight,
            layer.scales.astype(mx.float32),
            layer.biases.astype(mx.float32),
            group_size=32,
            bits=bits,
        )
        for name, layer in packed.items()
    }
    bias = layers.linear.bias
    assert to_float32(layers)
    for name, weight in exact.items():
        twin = layers[name]
        assert not hasattr(twin, "scales")
        assert twin.weight.dtype == mx.float32
        assert mx.array_equal(twin.weight, weight)
    assert mx.array_equal(layers.linear.bias, bias.astype(mx.float32))
    assert layers.norm.weight.dtype == mx.float32


def test_a_model_too_large_for_memory_is_left_as_it_is(monkeypatch):
    layers = Layers()
    layers.set_dtype(mx.float16)
    monkeypatch.setattr("mlx_mtp.backends.cpu.float32._memory_bytes", lambda: 1000)
    assert not to_float32(layers)
    assert layers.linear.weight.dtype == mx.float16
