"""Independent heads in the loop: whatever they draft, the text is the model's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.evaluation.acceptance import evaluate
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.lab.tiny_models import tiny_model
from mlx_mtp.model.config import HEAD_KINDS
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.exact import p_value
from tests.helpers.planted_heads import PlantedHeads
from tests.helpers.scripted import Script, mixed, right, wrong
from tests.helpers.tiny import tiny_base

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


def with_heads(base: Any, head: str, **values: Any) -> MTPModel:
    settings = TrainSettings(drafter="heads", head=head, num_draft_tokens=NUM_HEADS, **values)
    model = new_adapter(MTPModel(base), settings)
    assert model.heads is not None
    return model


def randomise(model: MTPModel, *, seed: int = 0, scale: float = 0.3) -> MTPModel:
    rng = np.random.default_rng(seed)
    assert model.heads is not None
    model.heads.load_weights(
        [
            (name.removeprefix("heads."), mx.array(scale * rng.standard_normal(value.shape)))
            for name, value in trainable(model).items()
        ]
    )
    return model


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
    model = randomise(with_heads(small_base(kind), head))
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
    model, plain = randomise(with_heads(base, head)), MTPModel(small_base("llama"))
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


def test_sampled_answers_have_the_models_distribution() -> None:
    vocab, prompt = 6, [3, 4, 1]
    model = randomise(with_heads(tiny_base("llama", vocab_size=vocab), "mlp"), scale=0.5)
    counts, probs = np.zeros((vocab,) * 3), np.zeros((vocab,) * 3)
    sampling = Sampling(temp=1.0)
    for seed in range(600):
        options: dict[str, Any] = {"layout": "quadratic", "sampling": sampling, "seed": seed}
        ids = [x for step in decode(model, prompt, max_tokens=3, **options) for x in step.tokens]
        counts[tuple(ids)] += 1
    for first in range(vocab):
        for second in range(vocab):
            hidden = model(mx.array([[*prompt, first, second]]), cache=model.make_cache())
            rows = np.array(mx.softmax(model.logits(hidden)[0, -3:], axis=-1))
            probs[first, second] = rows[0, first] * rows[1, second] * rows[2]
    assert p_value(counts.reshape(1, -1), probs.reshape(1, -1)) > 1e-3
