"""Mask rows in PyTorch are those of MLX, and their attention has the gradient of its forward."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.evaluation.forward import mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.lora import GatedLoRALinear
from mlx_mtp.model.mtp_model import MTPModel
from tests.backends.pytorch.test_model import DENSE, exact_base
from tests.helpers.tiny import random_adapter

torch = pytest.importorskip("torch")

from mlx_mtp.backends.pytorch.rows import (  # noqa: E402
    TorchRows,
    _Forward,
    _MaskAttention,
)

IDS = np.random.default_rng(3).integers(64, size=30)
BLOCKS = [
    MaskRows((4, 5, 11, 26), 3),  # all of one size
    MaskRows((0, 5, 6, 20), (3, 1, 2, 4)),
    MaskRows((9,), (1,)),
]


def adapted(kind: str) -> MTPModel:
    base = exact_base(kind)
    config, weights = random_adapter(base)
    return MTPModel(base, config=config, weights=weights)


def states(model: MTPModel, blocks: MaskRows, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mask rows in MLX and in PyTorch."""
    ids = mx.array(IDS)
    expected = np.array(mask_rows(model, ordinary_rows(model, ids), blocks))
    rows = TorchRows(model, device="cpu", **options)
    for path, module in model.base.named_modules():
        if isinstance(module, GatedLoRALinear):
            rows.linears[path].lora_a = torch.tensor(np.array(module.lora_a)).to(rows.dtype)
            rows.linears[path].lora_b = torch.tensor(np.array(module.lora_b)).to(rows.dtype)
    table = torch.tensor(np.array(model.base.model.embed_tokens.mask_embeddings))
    with torch.no_grad():
        hidden = rows.masks(
            rows.ordinary(torch.from_numpy(IDS)), blocks, table[blocks.mask_offsets]
        )
    return expected, hidden.float().numpy()


@pytest.mark.parametrize("kind", DENSE)
def test_mask_rows_are_those_of_mlx(kind):
    for blocks in BLOCKS:
        expected, actual = states(adapted(kind), blocks, dtype=torch.float32)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * abs(expected).max())


def test_bfloat16_is_near():
    expected, actual = states(adapted("qwen3"), BLOCKS[1], dtype=torch.bfloat16)
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_attention_has_the_gradient_of_its_forward(blocks, window):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, gradient: bool = True):
        x = torch.randn(shape, generator=draw, dtype=torch.float64)
        return x.requires_grad_(gradient)

    count, seen = blocks.num_rows, max(blocks.anchors) + 1
    own = normal(4, count, 6), normal(2, count, 6), normal(2, count, 6)
    cached = normal(2, seen, 6, gradient=False), normal(2, seen, 6, gradient=False)
    forward = _Forward(layers={}, blocks=blocks)

    def run(*own: Any):
        return _MaskAttention.apply(*own, *cached, forward, 0.4, window)

    assert torch.autograd.gradcheck(run, own)
    keys, values = (torch.cat(pair, dim=1) for pair in zip(cached, own[1:], strict=True))
    mask = torch.from_numpy(np.array(blocks.attention(seen, window)))
    expected = torch.nn.functional.scaled_dot_product_attention(
        own[0], keys, values, attn_mask=mask, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(run(*own), expected)


def test_ordinary_rows_do_not_see_the_adapter():
    model = adapted("llama")
    rows = TorchRows(model, dtype=torch.float32, device="cpu")
    expected = np.array(ordinary_rows(model, mx.array(IDS)).hidden)
    for linear in rows.linears.values():
        linear.lora_a = linear.lora_b = torch.full((1, 1), torch.nan)
    actual = rows.ordinary(torch.from_numpy(IDS)).hidden.numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_capped_scores_are_refused():
    from mlx_mtp.backends.pytorch.rows import attend

    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="capped"):
        attend(None, x, x, x, None, mask_rows=_Forward(layers={}), softcap=30.0)
