"""The default model end to end, against mlx-lm's own layers on the same float32 weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

from mlx_mtp.decoding.batching import can_batch
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.loading import load
from mlx_mtp.storage.default_model import default_model_path
from tests.helpers.requests import finish_alone, step_together

pytestmark = pytest.mark.slow
MAX_TOKENS = 20
LAYOUTS = ("plain", "auto", "linear", "quadratic")


def cases() -> Iterator[Any]:
    """Prompts, each with one fixed layout next to ``auto``; in soak tests with every layout."""
    for place, prompt in enumerate(builtin_prompts()[::25]):
        fixed = ("plain", "linear", "quadratic")[place % 3]
        yield pytest.param(prompt, ("auto", fixed), id=prompt.id)
        yield pytest.param(prompt, LAYOUTS, id=f"{prompt.id}-all", marks=pytest.mark.soak)


@pytest.fixture(scope="module")
def ours() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def stock() -> Any:
    """mlx-lm's model class with its own linear layers and our float32 weights."""
    config = json.loads((default_model_path() / "config.json").read_text())
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    plain, _ = load(mtp=False)
    model.load_weights(tree_flatten(plain.base.parameters()), strict=True)
    return model


@pytest.mark.parametrize(("prompt", "layouts"), cases())
def test_ids_equal_those_of_mlx_lm(ours, stock, prompt, layouts):
    model, tokenizer = ours
    text = chat_text(tokenizer, [{"role": "user", "content": prompt.text}])
    ids = encode_prompt(tokenizer, text, add_special_tokens=False)
    expected = [
        int(token) for token, _ in generate_step(mx.array(ids), stock, max_tokens=MAX_TOKENS)
    ]
    for layout in layouts:
        steps = list(decode(model, ids, max_tokens=MAX_TOKENS, layout=layout))
        assert [token for step in steps for token in step.tokens] == expected, layout


def test_answers_that_share_forwards_are_those_alone(ours):
    model, tokenizer = ours
    assert can_batch(model)
    texts = [chat_text(tokenizer, [{"role": "user", "content": each.text}])
             for each in builtin_prompts()[::25]]  # fmt: skip
    prompts = [encode_prompt(tokenizer, text, add_special_tokens=False) for text in texts]
    alone, shared = (
        [make_request(model, ids, max_tokens=MAX_TOKENS, layout=layout) for ids in prompts]
        for layout in ("plain", "quadratic")
    )
    expected = finish_alone(model, alone)
    emitted: list[list[int]] = [[] for _ in prompts]
    while going := [i for i, one in enumerate(shared) if not one.finished]:
        for i, ids in zip(going, step_together(model, [shared[i] for i in going]), strict=True):
            emitted[i] += ids
    assert emitted == expected


def test_the_shipped_adapter_drafts_well(ours):
    model, tokenizer = ours
    text = "Write a Python function that computes the factorial of n, and explain how it works."
    ids = encode_prompt(
        tokenizer,
        chat_text(tokenizer, [{"role": "user", "content": text}]),
        add_special_tokens=False,
    )
    steps = list(decode(model, ids, max_tokens=64, layout="quadratic"))
    assert model.num_draft_tokens == 8
    assert sum(len(step.tokens) for step in steps) / len(steps) > 1.9
