"""The gate: ordinary rows are the base layer's bits, mask rows get the low-rank product."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.model.layout import StepLayout, StepScope, plain_layout
from mlx_mtp.model.lora import GatedLoRALinear, linear_dims

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
