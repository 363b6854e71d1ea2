"""Native modules compute what PyTorch computes from the published weights and equations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.model.native.module import build_native_module
from mlx_mtp.model.native.names import native_tensors, num_modules
from mlx_mtp.model.native.published import canonical_tensors, without_copies
from tests.helpers.native_models import KINDS, Published, publish
from tests.helpers.transformers_models import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="needs torch and transformers")
ROWS = 9  # more than a window has
BOUND = 1e-4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    made: dict[str, Published] = {}

    def get(kind: str) -> Published:
        if kind not in made:
            made[kind] = publish(kind, tmp_path_factory.mktemp(kind))
        for module in made[kind].reference.modules:
            module.rows.clear()
        return made[kind]

    return get


def states(model: Published, count: int = ROWS, seed: int = 5):
    """Random hidden states ``[L, D]`` as the family passes them on, and as ``MTPModel`` has them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, model.reference.table.shape[1], generator=generator)
    final = hidden
    if model.reference.kind.before_norm:
        final = model.reference.norm(hidden, model.reference.final_norm)
    return hidden, mx.array(final.numpy())[None]


def ids_of(count: int) -> list[int]:
    return [(7 * i + 3) % 90 for i in range(count)]


def error(values: mx.array, expected) -> float:
    return float(np.abs(np.array(values)[0] - expected.numpy()).max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_pytorch(kind, published):
    model = published(kind)
    tensors = canonical_tensors(model.base, model.tensors, model.config)
    native = build_native_module(model.base, tensors, model.config)
    assert native.num_modules == num_modules(model.config) == KINDS[kind].count
    cache = native.make_cache()
    expected, hidden = states(model)
    for index in range(native.num_modules):  # each has seen all rows, as after a prompt
        hidden = native(hidden, mx.array([ids_of(ROWS)]), cache=cache, index=index)
        expected = model.reference.run(expected, ids_of(ROWS), index=index)
        logits = model.reference.logits(expected, index=index)
        assert error(native.logits(hidden, index), logits) < BOUND
    hidden, expected = hidden[:, -1:], expected[-1:]
    for index in range(3):
        token = int(logits[-1].argmax())
        assert token == int(native.logits(hidden, index + native.num_modules - 1)[0, -1].argmax())
        hidden = native(hidden, mx.array([[token]]), cache=cache, index=index)
        expected = model.reference.run(expected, [token], index=index)
        logits = model.reference.logits(expected, index=index)
        assert error(native.logits(hidden, index), logits) < BOUND
