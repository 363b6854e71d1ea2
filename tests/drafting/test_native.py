"""Chains of drafts by native modules, as PyTorch makes them from the whole text."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.drafting.drafter import CommittedStep, Drafts
from mlx_mtp.drafting.native import NativeDrafter
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.native.module import build_native_module
from mlx_mtp.model.native.published import canonical_tensors
from tests.helpers.native_models import Published, publish
from tests.helpers.transformers_models import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="needs torch and transformers")


@pytest.fixture(scope="module", params=[("step3p5", 3), ("deepseek_v3", 2), ("qwen3_5", 1)])
def published(request, tmp_path_factory):
    name, count = request.param
    made = publish(name, tmp_path_factory.mktemp(name), count=count)
    tensors = canonical_tensors(made.base, made.tensors, made.config)
    model = MTPModel(made.base)
    model.native = build_native_module(made.base, tensors, made.config)
    assert model.native.num_modules == count
    return made, model


def expected_drafts(made: Published, hidden: Any, ids: list[int]) -> list[int]:
    """Draft i is what module i says of the text and the drafts before, all rows read anew."""
    drafts: list[int] = []
    for module in made.reference.modules:
        module.rows.clear()
    for index in range(len(made.reference.modules)):
        known = (ids + drafts)[index:]
        hidden = made.reference.run(hidden, known, index=index)
        logits = made.reference.logits(hidden[-1:], index=index)
        drafts.append(int(logits[0].argmax()))
    return drafts


def committed(hidden: mx.array, ids: list[int]) -> CommittedStep:
    return CommittedStep(
        layout=StepLayout(max(len(ids), 1), 0, (0,)), next_ids=ids, tokens=[1], hidden=hidden,
        drafts=Drafts.none(),
    )  # fmt: skip


def test_drafts_equal_those_of_pytorch_however_the_text_comes(published):
    import torch

    made, model = published
    kind, count = made.reference.kind, model.native.num_modules
    rng = np.random.default_rng(0)
    own = torch.from_numpy(rng.standard_normal((40, 64)).astype(np.float32))
    final = made.reference.norm(own, made.reference.final_norm) if kind.before_norm else own
    hidden, ids = mx.array(final.numpy()), rng.integers(3, 90, 40).tolist()
    drafter, end = NativeDrafter(model, model.make_cache(), None), 0
    for rows in (1, 1, 5, 1, 3, 2, 1, 8):
        drafter.commit(committed(hidden[end : end + rows], ids[end : end + rows]))
        end += rows
        drafts = drafter.propose(count, key=mx.random.key(0)).ids()
        expected = expected_drafts(made, own[:end], ids[:end])
        usable = min(count, end)  # module i has no row before there are i + 1
        assert drafts[:usable] == expected[:usable]
    drafter.commit(committed(hidden[:0], []))
    offsets = [layer.offset for layer in drafter._rows.cache.layers]
    assert offsets == [end - index for index in range(count)]


def test_more_drafts_than_modules(published):
    _, model = published
    drafter = NativeDrafter(model, model.make_cache(), None)
    drafter.commit(committed(mx.ones((3, 64)), [4, 5, 6]))
    first = drafter.propose(7, key=mx.random.key(0)).ids()
    assert len(first) == 7
    drafter.commit(committed(mx.ones((0, 64)), []))
    assert drafter.propose(7, key=mx.random.key(1)).ids() == first


def test_ids_in_the_loop_are_those_of_plain_decoding(published):
    _, model = published
    prompt = [3, 17, 42, 8, 29, 55, 1, 33, 20]
    plain = list(decode(model, prompt, layout="plain", max_tokens=24))
    steps = list(decode(model, prompt, layout="linear", drafter="native", max_tokens=24))
    ids = [token for step in steps for token in step.tokens]
    assert ids == [token for step in plain for token in step.tokens]
    assert sum(step.num_draft_tokens for step in steps) > 20
