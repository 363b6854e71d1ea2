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


def cases() -> Iterator[Any]:
    """Prompts and options of ``decode``: steps of few rows here, of all of them in soak tests."""
    for place, prompt in enumerate(builtin_prompts()[::25]):
        fixed = ("plain", "linear", "quadratic")[place % 3]
        few: list[dict[str, Any]] = [{}, {"layout": fixed, "num_draft_tokens": 3}]
        many = [{"layout": layout} for layout in ("plain", "linear", "quadratic")]
        yield pytest.param(prompt, few, id=prompt.id)
        yield pytest.param(prompt, many, id=f"{prompt.id}-all", marks=pytest.mark.soak)


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


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    text = chat_text(tokenizer, [{"role": "user", "content": question}])
    return encode_prompt(tokenizer, text, add_special_tokens=False)


def stock_ids(stock: Any, prompt: list[int], count: int) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), stock, max_tokens=count)]


@pytest.mark.parametrize(("prompt", "ways"), list(cases()))
def test_ids_equal_those_of_mlx_lm(ours, stock, prompt, ways):
    model, tokenizer = ours
    ids = prompt_ids(tokenizer, prompt.text)
    expected = stock_ids(stock, ids, MAX_TOKENS)
    for options in ways:
        steps = list(decode(model, ids, max_tokens=MAX_TOKENS, **options))
        assert [token for step in steps for token in step.tokens] == expected, options


def test_answers_that_share_forwards_are_those_alone(ours):
    model, tokenizer = ours
    assert can_batch(model)
    prompts = [prompt_ids(tokenizer, prompt.text) for prompt in builtin_prompts()[::25]]
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "num_draft_tokens": 3}
    alone, shared = (
        [make_request(model, ids, layout=layout, **options) for ids in prompts]
        for layout in ("plain", "quadratic")
    )
    expected = finish_alone(model, alone)
    emitted: list[list[int]] = [[] for _ in prompts]
    while going := [i for i, one in enumerate(shared) if not one.finished]:
        for i, ids in zip(going, step_together(model, [shared[i] for i in going]), strict=True):
            emitted[i] += ids
    assert emitted == expected


def test_the_shipped_adapter_drafts_well(ours, stock):
    model, tokenizer = ours
    ids = prompt_ids(
        tokenizer,
        "Write a Python function that computes the factorial of n, and explain how it works.",
    )
    steps = list(decode(model, ids, max_tokens=64, layout="quadratic"))
    assert model.num_draft_tokens == 8
    emitted = [token for step in steps for token in step.tokens]
    assert len(emitted) / len(steps) > 1.9
    assert emitted == stock_ids(stock, ids, 64)
