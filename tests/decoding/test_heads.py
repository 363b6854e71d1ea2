"""Independent heads in the loop: whatever they draft, the text is the model's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.drafting.shortlist import draw
from mlx_mtp.evaluation.acceptance import evaluate
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.lab.tiny_models import tiny_model
from mlx_mtp.model.config import HEAD_KINDS, HeadsConfig
from mlx_mtp.model.draft_heads import DraftHeads
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.settings import TrainSettings
from tests.decoding.test_sampling import VOCAB, chain_p_values, table_model
from tests.helpers.exact import holm
from tests.helpers.planted_heads import PlantedHeads
from tests.helpers.scripted import Script, TableModel, mixed, right, wrong
from tests.helpers.tiny import random_heads, tiny_base

PROMPT, LENGTH, NUM_HEADS = [3, 9, 4, 1, 7], 40, 3
KINDS = ("llama", "gemma3_text", "phi3", "qwen3_moe", "deepseek_v3", "smollm3", "olmo2", "granite")
FAMILIES = ("qwen3_next", "jamba")  # recurrent layers
SMALL: dict[str, Any] = {"vocab_size": 24}


def small_base(kind: str) -> Any:
    return tiny_model(kind, **SMALL) if kind in FAMILIES else tiny_base(kind, **SMALL)


def answer(model: MTPModel, **options: Any) -> tuple[list[int], int]:
    """The ids of an answer, and the number of steps."""
    steps = list(decode(model, PROMPT, max_tokens=LENGTH, **options))
    return [token for step in steps for token in step.tokens], len(steps)


def with_random_heads(base: Any, head: str) -> MTPModel:
    config, weights = random_heads(base, head=head, count=NUM_HEADS)
    return MTPModel(base, config=config, weights=weights)


@pytest.mark.parametrize("kind", (*KINDS, *FAMILIES))
@pytest.mark.parametrize("layout", ["quadratic", "auto"])
def test_planted_drafts_decide_the_steps_and_not_the_text(kind: str, layout: str) -> None:
    model = MTPModel(small_base(kind))
    text, _ = answer(model, layout="plain")
    sequence, cache = [*PROMPT, *text], model.make_cache()
    # Where a prompt's last id is on its own, its step has drafts too.
    first = 0 if cache.last_id_alone or cache.chunks_matter else 1
    scripts: dict[str, Script] = {
        "right": right(sequence), "wrong": wrong(sequence), "mixed": mixed(sequence, seed=1)
    }  # fmt: skip
    for name, script in scripts.items():
        model.heads = PlantedHeads(model, script, NUM_HEADS)  # type: ignore[assignment]
        ids, steps = answer(model, layout=layout, drafter="heads")
        assert ids == text, name
        if layout == "quadratic":
            fewest = first + -(-(LENGTH - first) // (NUM_HEADS + 1))
            expected = {"right": [fewest], "wrong": [LENGTH], "mixed": range(fewest + 1, LENGTH)}
            assert steps in expected[name], name


@pytest.mark.parametrize("head", HEAD_KINDS)
@pytest.mark.parametrize("kind", (*KINDS, *FAMILIES))
def test_random_heads_leave_the_text_as_it_is(kind: str, head: str) -> None:
    text, _ = answer(MTPModel(small_base(kind)), layout="plain")
    model = with_random_heads(small_base(kind), head)
    for options in ({}, {"drafter": "heads"}, {"layout": "quadratic"}):
        assert answer(model, **options)[0] == text, options


@pytest.mark.parametrize("head", HEAD_KINDS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
def test_the_evaluation_counts_the_steps_of_a_decode(kind: str, head: str) -> None:
    base = small_base(kind)
    text, _ = answer(MTPModel(base), layout="plain")
    flags = [False] * len(PROMPT) + [True] * LENGTH
    sequence = TokenSequence([*PROMPT, *text], flags)
    settings = TrainSettings(
        drafter="heads", head=head, num_draft_tokens=NUM_HEADS, num_anchors=64, rows_per_forward=512
    )
    model = new_adapter(MTPModel(base), settings)
    gradient = StepGradient(model, settings)
    for step in range(25):  # towards this very text, so that some drafts are accepted
        parameters = trainable(model)
        found = gradient(parameters, [sequence], [0], step=step).gradients
        gradient.load({name: x - 0.3 * found[name] for name, x in parameters.items()})
    ids, steps = answer(model, layout="quadratic")
    assert ids == text
    evaluation = evaluate(model, [sequence], max_tokens=LENGTH)
    assert evaluation.num_steps == steps < LENGTH
    fewer = evaluate(model, [sequence], max_tokens=LENGTH, num_draft_tokens=1)
    assert fewer.num_steps == answer(model, layout="quadratic", num_draft_tokens=1)[1]


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_another_answer_of_a_conversation_continues_with_the_same_memory(head: str) -> None:
    base = small_base("llama")
    model, plain = with_random_heads(base, head), MTPModel(small_base("llama"))
    cache, ids = model.make_cache(), list(PROMPT)
    for _ in range(3):
        options: dict[str, Any] = {"max_tokens": 12, "layout": "quadratic", "drafter": "heads"}
        new = [
            token
            for step in decode(model, ids[cache.offset :], cache=cache, **options)
            for token in step.tokens
        ]
        expected = [
            token
            for step in decode(plain, ids, max_tokens=12, layout="plain")
            for token in step.tokens
        ]
        assert new == expected
        ids += [*new, 5, 6]


def heads_on_a_table() -> TableModel:
    """A Markov chain whose hidden states are logits, with heads that change them a little."""
    model = table_model()
    config = HeadsConfig(
        num_draft_tokens=NUM_HEADS,
        head="mlp",
        base_model="table",
        base_model_type="table",
        base_hidden_size=VOCAB,
        base_num_layers=1,
        base_vocab_size=VOCAB,
        base_fingerprint="",
    )
    rng = np.random.default_rng(3)
    shapes = {"weight": (NUM_HEADS, VOCAB, VOCAB), "bias": (NUM_HEADS, VOCAB)}
    weights = {name: mx.array(0.5 * rng.standard_normal(x)) for name, x in shapes.items()}
    model.heads = DraftHeads(config, weights, dtype=mx.float32)
    sizes: Any = model  # what the cost of proposing is estimated from
    sizes.base, sizes.parts = nn.Embedding(VOCAB, VOCAB), SimpleNamespace(head="weight")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["quadratic", "auto"])
def test_sampled_answers_have_the_models_distribution(layout: str) -> None:
    found = chain_p_values(layout, Sampling(temp=1.0), model=heads_on_a_table(), drafter="heads")
    assert holm(found.values())[0] > 0.001, found


@pytest.mark.slow
def test_a_bias_of_the_drafts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(logits: mx.array, distribution: Any, *, key: mx.array) -> Drafts:
        drafts = draw(2 * logits, distribution, key=key)
        return Drafts(drafts.tokens, drafts.candidates, draw(logits, distribution, key=key).probs)

    monkeypatch.setattr("mlx_mtp.drafting.heads.draw", biased)
    model = heads_on_a_table()
    found = chain_p_values("quadratic", Sampling(temp=1.0), model=model, drafter="heads")
    assert holm(found.values())[0] < 1e-6, found
