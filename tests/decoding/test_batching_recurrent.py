"""Several answers in one forward of a model with recurrent layers: each continues its own state."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.decoding.batching import can_batch, forward
from mlx_mtp.decoding.step import run
from mlx_mtp.lab.tiny_models import tiny_model, with_adapter
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from tests.decoding.test_batching import (
    GREEDY,
    LAYOUTS,
    PROMPTS,
    answers,
    held,
    rows_of,
    together,
)
from tests.helpers.requests import finish_alone
from tests.helpers.scripted import ScriptedModel, mixed

FAMILIES = (
    "qwen3_5",
    "nemotron_h",  # Mamba2, whose rows are computed one by one
    "falcon_h1",  # attention and Mamba2 in one layer
    "lfm2",  # convolutions only
    "jamba",  # called run by run
    "mamba2",  # no attention, no positions
    "kimi_linear",  # three convolutions, latent attention
    "bailing_moe_linear",
)
OTHERS = (
    "qwen3_next",
    "qwen3_5_moe",
    "olmo_hybrid",
    "granitemoehybrid",
    "lfm2_moe",
    "gear",
    "kimi_k3",
    "bailing_hybrid",
    "bailing_moe_v3",
    "rwkv7",
)


def close(found: mx.array, expected: mx.array) -> bool:
    """Whether arrays differ by rounding only: products of other numbers of rows round otherwise."""
    return bool(mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item())


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.soak) for family in OTHERS)]
)
def test_a_forward_is_the_separate_ones(family: str) -> None:
    model = with_adapter(tiny_model(family))
    assert can_batch(model)
    alone, caches = ([held(model, prompt) for prompt in PROMPTS] for _ in range(2))
    expected = [
        model(mx.array([rows_of(layout)]), cache=cache, layout=layout)[0]
        for cache, layout in zip(alone, LAYOUTS, strict=True)
    ]
    found = forward(model, [mx.array(rows_of(layout)) for layout in LAYOUTS], caches, LAYOUTS)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other)
    for number, (cache, wanted) in enumerate(zip(caches, alone, strict=True)):
        layout = LAYOUTS[number]
        num_dropped = layout.num_rows - layout.num_pending - min(number, layout.num_draft_tokens)
        for each in (cache, wanted):
            each.rewind(num_dropped)
        check_states(cache, wanted)


def check_states(cache: Any, wanted: Any) -> None:
    assert cache.offset == wanted.offset
    for layer, other in zip(cache.recurrent_layers, wanted.recurrent_layers, strict=True):
        for one, two in zip(layer.to_mlx_lm().cache, other.to_mlx_lm().cache, strict=True):
            assert close(one, two)


def test_the_first_step_of_a_text_starts_without_a_state() -> None:
    model = with_adapter(tiny_model("qwen3_5"))
    layouts = [StepLayout(1, 0, (2,)), StepLayout(1, 1, (0, 1))]
    alone, caches = ([model.make_cache() for _ in layouts] for _ in range(2))
    expected = [
        model(mx.array([rows_of(layout)]), cache=cache, layout=layout)[0]
        for cache, layout in zip(alone, layouts, strict=True)
    ]
    assert can_batch(model)
    found = forward(model, [mx.array(rows_of(layout)) for layout in layouts], caches, layouts)
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_5",
        *(pytest.param(each, marks=pytest.mark.soak) for each in ("falcon_h1", "mamba2", "jamba")),
    ],
)
def test_greedy_ids_are_those_of_plain_decoding(family: str) -> None:
    model = with_adapter(tiny_model(family), num_draft_tokens=3)
    expected = finish_alone(model, answers(model, [{"layout": "plain"}] * 4))
    drafted: Any = ScriptedModel(model, mixed([0] * 5 + expected[0], seed=0))
    requests = answers(drafted, GREEDY)
    for step, request in [(request.plan(), request) for request in requests]:
        if step.is_prompt_chunk:  # all but the last id, which are not batched
            request.commit(run(drafted, [step])[0])
    found, sizes = together(drafted, requests, seed=0)
    assert found == expected
    assert max(sizes) == 4


def test_attention_without_a_seam_is_not_batched() -> None:
    model = MTPModel(tiny_model("plamo2"))
    assert not can_batch(model)
    assert model.scope.layout is None
