"""The output head as it is now, and the same for some of the tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_mtp.backends.cpu.float32 import DenseEmbedding, DenseLinear, to_float32
from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.layers import KernelEmbedding, KernelLinear, packed_weight
from mlx_mtp.model.head import PartialHead, select_rows
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.parts import module_at
from mlx_mtp.model.wrappers import Wrapper, replace
from tests.helpers.families import family_base
from tests.helpers.tiny import KINDS, tiny_base, tiny_mtp

IDS = mx.array([9, 0, 63, 17, 2])
# Factors and limits of the logits, biases, heads in the backbone or of several layers.
FAMILIES = ("cohere", "gemma2", "gemma3n", "gpt_neox", "internlm2", "lille-130m", "phi", "minicpm")


def states(model: MTPModel) -> mx.array:
    """Hidden states ``[1, 3, D]``."""
    return mx.random.normal((1, 3, model.hidden_size), key=mx.random.key(0))


def partial(model: MTPModel) -> PartialHead:
    """The head for ``IDS``."""
    return PartialHead(model.base, model.parts, IDS)


def head_module(model: MTPModel) -> Any:
    """The module with the unembedding."""
    return module_at(model.base, model.parts.head or model.parts.embedding)


class Doubled(Wrapper):
    """An unembedding whose logits are twice as large."""

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply, or look up."""
        return self.wrapped(x) * (2 if mx.issubdtype(x.dtype, mx.floating) else 1)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply."""
        return self.wrapped.as_linear(x) * 2


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_head_that_is_replaced_later_is_used(kind: str, adapter: bool) -> None:
    """As kernels are, which are chosen when the model exists."""
    model = tiny_mtp(kind) if adapter else MTPModel(tiny_base(kind))
    hidden = states(model)
    before = model.logits(hidden)
    path = model.parts.head or model.parts.embedding
    replace(model.base, {path: Doubled(head_module(model))})
    assert mx.array_equal(model.logits(hidden), 2 * before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantised", [False, True])
def test_some_tokens_have_the_logits_that_they_have_among_all(kind: str, quantised: bool) -> None:
    model = tiny_mtp(kind, quantised=quantised)
    hidden = states(model)
    before = model.logits(hidden)
    found = partial(model).logits(hidden)
    assert found.shape == (1, 3, 5)
    assert mx.allclose(found, before[..., IDS], rtol=1e-5, atol=1e-5)
    assert mx.array_equal(model.logits(hidden), before)  # the model has its own head still


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_and_limits_of_the_logits_apply(family: str) -> None:
    model = MTPModel(family_base(family))
    hidden = 8 * states(model)
    found, expected = partial(model).logits(hidden), model.logits(hidden)[..., IDS]
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantised_rows_stay_packed(kind: str, mode: str) -> None:
    base = tiny_base(kind)
    nn.quantize(base, group_size=32, bits=4, mode=mode)
    model = MTPModel(base)
    whole = head_module(model)
    part = select_rows(whole, IDS)
    assert type(part) is type(whole) and part.weight.dtype == mx.uint32
    for name in ("weight", "scales", "biases"):
        if name in whole:
            assert mx.array_equal(part[name], whole[name][IDS])
    size = sum(array.nbytes for array in whole.values() if isinstance(array, mx.array))
    assert partial(model).nbytes * 64 == size * 5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_layers_of_the_back_ends_keep_their_kind(kind: str) -> None:
    base = tiny_base(kind, quantised=True)
    to_float32(base)
    model = MTPModel(base)
    hidden, whole = states(model), head_module(model)
    assert isinstance(select_rows(whole, IDS), type(whole))
    found = partial(model).logits(hidden)
    assert mx.allclose(found, model.logits(hidden)[..., IDS], rtol=1e-5, atol=1e-5)
    stream = mx.default_stream(mx.cpu)
    dense = DenseLinear(mx.random.normal((64, 32)), bias=mx.arange(64), helper=stream)
    rows = mx.random.normal((1, 2, 32))
    assert mx.allclose(select_rows(dense, IDS)(rows), dense(rows)[..., IDS], atol=1e-5)
    tied = DenseEmbedding(mx.random.normal((64, 32)), helper=stream)
    expected = tied.as_linear(rows)[..., IDS]
    assert mx.allclose(select_rows(tied, IDS).as_linear(rows), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [KernelLinear, KernelEmbedding])
def test_a_kernels_layer_has_the_packed_rows(kind: Any) -> None:
    is_linear = kind is KernelLinear
    stock: Any = nn.Linear(32, 64) if is_linear else nn.Embedding(64, 32)
    stock = stock.to_quantized(group_size=32, bits=4)
    packed = packed_weight(stock)
    assert packed is not None
    part = select_rows(kind(stock, packed, KernelChoice(ours=False)), IDS)
    assert type(part) is kind and part._packed.shape == (5, 32)
    assert mx.array_equal(part._packed.weight, packed.weight[IDS])
    rows = mx.random.normal((1, 2, 32))  # stock MLX multiplies them here
    found, expected = (x(rows) if is_linear else x.as_linear(rows) for x in (part, stock))
    assert mx.allclose(found, expected[..., IDS], atol=1e-5)
    assert stock.weight.shape[0] == 64
