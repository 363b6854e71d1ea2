"""The gate: ordinary rows are the base layer's bits, mask rows get the low-rank product."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.lab.dispatches import primitives
from mlx_mtp.model.layout import StepLayout, StepScope, plain_layout
from mlx_mtp.model.lora import (
    MAX_ZERO_ROWS,
    GatedLoRALinear,
    SharedInput,
    linear_dims,
    share_inputs,
)

IN, OUT, RANK = 64, 48, 3


def random(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def layer(*, bias: bool = False, quantised: bool = False) -> nn.Module:
    linear = nn.Linear(IN, OUT, bias=bias)
    linear.weight = random(OUT, IN, seed=0)
    if bias:
        linear.bias = random(OUT, seed=1)
    return linear.to_quantized(group_size=32, bits=4) if quantised else linear


def gated(linear: nn.Module, scope: StepScope) -> GatedLoRALinear:
    return GatedLoRALinear.from_base(
        linear,
        lora_a=random(IN, RANK, seed=2),
        lora_b=random(RANK, OUT, seed=3),
        scale=1.5,
        scope=scope,
    )


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [StepLayout(1, 0, (1,)), StepLayout(2, 2, (1, 0, 3))])
def test_rows_before_the_split_keep_their_bits(
    layout: StepLayout, bias: bool, quantised: bool
) -> None:
    linear, scope = layer(bias=bias, quantised=quantised), StepScope()
    wrapped = gated(linear, scope)
    x = random(1, layout.num_rows, IN, seed=4)
    base = linear(x)
    scope.layout = layout
    y = wrapped(x)
    split = layout.gate_split
    assert mx.array_equal(y[:, :split], base[:, :split])
    low_rank = np.array(x, np.float64)[:, split:] @ np.array(wrapped.lora_a, np.float64)
    expected = np.array(base, np.float64)[:, split:]
    expected = expected + 1.5 * low_rank @ np.array(wrapped.lora_b, np.float64)
    assert np.abs(np.array(y)[:, split:] - expected).max() < 1e-4
    assert np.abs(np.array(y - base)[:, split:]).min(axis=-1).max() > 0


@pytest.mark.parametrize("layout", [None, plain_layout(num_pending=4)])
def test_a_step_without_masks_is_the_base_layer(layout: StepLayout | None) -> None:
    linear, scope = layer(), StepScope()
    wrapped = gated(linear, scope)
    scope.layout = layout
    x = random(1, 4, IN, seed=4)
    assert mx.array_equal(wrapped(x), linear(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dimensions_of_quantised_layers(bits: int) -> None:
    assert linear_dims(layer()) == (IN, OUT)
    quantised = nn.Linear(IN, OUT).to_quantized(group_size=32, bits=bits)
    assert linear_dims(quantised) == (IN, OUT)


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((IN + 1, RANK), (RANK, OUT)),
        ((IN, RANK), (RANK, OUT + 1)),
        ((IN, RANK), (RANK + 1, OUT)),
        ((RANK, IN), (OUT, RANK)),
    ],
)
def test_weights_of_other_shapes_are_refused(
    shape_a: tuple[int, int], shape_b: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"a layer of {IN} to {OUT}"):
        GatedLoRALinear.from_base(
            layer(), lora_a=mx.zeros(shape_a), lora_b=mx.zeros(shape_b), scale=1, scope=StepScope()
        )


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="Embedding cannot carry"):
        GatedLoRALinear.from_base(
            nn.Embedding(4, IN),
            lora_a=mx.zeros((IN, RANK)),
            lora_b=mx.zeros((RANK, OUT)),
            scale=1,
            scope=StepScope(),
        )


class Block(nn.Module):
    """Layers with one input, and one with another."""

    def __init__(self, scope: StepScope, *, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        for index, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            linear = nn.Linear(IN, OUT, bias=False)
            linear.weight = random(OUT, IN, seed=10 + index).astype(dtype)
            weights = {
                "lora_a": random(IN, RANK + index, seed=20 + index).astype(dtype),
                "lora_b": random(RANK + index, OUT, seed=30 + index).astype(dtype),
            }
            self[name] = GatedLoRALinear.from_base(linear, **weights, scale=0.5, scope=scope)

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [self[name](x) for name in ("q_proj", "k_proj", "v_proj")]


LAYOUT = StepLayout(2, 1, (1, 2))


def bits(x: mx.array) -> mx.array:
    return mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_adding_zeros_changes_no_bit_of_an_ordinary_row(dtype: mx.Dtype) -> None:
    scope = StepScope()
    block = Block(scope, dtype=dtype)
    x = random(1, LAYOUT.num_rows, IN, seed=5).astype(dtype)
    plain = block(x)
    scope.layout = LAYOUT
    for y, expected in zip(block(x), plain, strict=True):
        split = LAYOUT.gate_split
        assert mx.array_equal(bits(y[:, :split]), bits(expected[:, :split]))
        assert not mx.any(y[:, split:] == expected[:, split:], axis=-1).all()


def test_a_prompt_chunk_sets_its_rows_apart() -> None:
    scope = StepScope()
    wrapped = gated(layer(), scope)
    layout = StepLayout(MAX_ZERO_ROWS + 1, 0, (2,))
    x = random(1, layout.num_rows, IN, seed=5)
    plain = wrapped.linear(x)
    scope.layout = layout
    y = wrapped(x)
    assert "Concatenate" in primitives(y) and "SliceUpdate" not in primitives(y)
    assert mx.array_equal(y[:, : layout.gate_split], plain[:, : layout.gate_split])


def test_layers_with_the_same_input_form_their_first_product_once() -> None:
    scope = StepScope()
    alone, together = Block(scope), Block(scope)
    share_inputs(together)
    scope.layout = LAYOUT
    for seed in (5, 6):
        x = random(1, LAYOUT.num_rows, IN, seed=seed)
        expected, found = alone(x), together(x)
        counts = primitives(found)
        mx.eval(expected, found)
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
    assert counts["AddMM"] == 3 and counts["Split"] == 1 and counts["SliceUpdate"] == 1
    assert counts["Matmul"] == 3 + 1  # the base layers', and the first product of all


def test_an_input_is_free_once_all_its_layers_have_used_it() -> None:
    calls: list[int] = []

    def compute(x: mx.array, split: int) -> list[int]:
        calls.append(split)
        return [10, 11]

    shared, x, other = SharedInput(compute), mx.zeros((1, 2, 3)), mx.zeros((1, 2, 3))
    assert [shared.of(x, i, gate_split=1) for i in (0, 1)] == [10, 11] and calls == [1]
    assert shared._input is None
    assert shared.of(x, 0, gate_split=1) == 10 and len(calls) == 2  # the same again
    assert shared.of(other, 1, gate_split=1) == 11 and len(calls) == 3  # another input
    assert shared.of(other, 0, gate_split=2) == 10 and len(calls) == 4  # another step
    assert shared.of(other, 0, gate_split=2) == 10 and len(calls) == 5  # asked for twice


def test_new_weights_are_used_as_after_a_training_step() -> None:
    scope = StepScope()
    block: Any = Block(scope)
    share_inputs(block)
    x = random(1, LAYOUT.num_rows, IN, seed=5)
    scope.layout = LAYOUT
    mx.eval(block(x))
    new_a, new_b = random(IN, RANK + 1, seed=40), random(RANK + 1, OUT, seed=41)
    block.k_proj.update({"lora_a": new_a, "lora_b": new_b})
    y = block(x)[1]
    low_rank = x[:, LAYOUT.gate_split :] @ new_a
    expected = block.k_proj.linear(x)[:, LAYOUT.gate_split :] + 0.5 * low_rank @ new_b
    assert mx.allclose(y[:, LAYOUT.gate_split :], expected, atol=1e-4)
    assert mx.array_equal(block.k_proj.lora_a, new_a)


def test_gradients_reach_the_weights_of_layers_that_share_an_input() -> None:
    scope = StepScope()
    alone, together = Block(scope), Block(scope)
    share_inputs(together)
    scope.layout = LAYOUT
    x = random(1, LAYOUT.num_rows, IN, seed=5)
    found = []
    for block in (alone, together):
        block.freeze()
        for name in ("q_proj", "k_proj", "v_proj"):
            block[name].unfreeze(keys=["lora_a", "lora_b"], recurse=False)

        def loss(block: Block, x: mx.array) -> mx.array:
            return sum((mx.sin(y).sum() for y in block(x)), mx.array(0.0))

        found.append(tree_flatten(nn.value_and_grad(block, loss)(block, x)[1]))
    assert len(found[0]) == 6
    for (name, a), (other, b) in zip(*found, strict=True):
        assert name == other and mx.abs(a).max() > 0 and mx.allclose(a, b, rtol=1e-4, atol=1e-3)


def test_a_model_is_freed_without_a_search_for_cycles() -> None:
    block = Block(StepScope())
    share_inputs(block)
    known = weakref.ref(block.q_proj)
    gc.disable()
    try:
        del block
        assert known() is None
    finally:
        gc.enable()
