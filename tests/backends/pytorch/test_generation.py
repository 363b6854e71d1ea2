"""Batched generation in PyTorch: the model's own text, whatever the other rows are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_mtp.backends.pytorch.generation import TorchGenerator
from mlx_mtp.evaluation.batch_generation import generate_batch
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.data.distil_run import Draw
from tests.helpers.tiny import tiny_base

PROMPTS = [[(7 * i + n) % 60 for i in range(n)] for n in (3, 9, 14, 5, 7, 1, 4, 30, 6, 8)]
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "granite")


def tiny(kind: str = "llama", **overrides: Any) -> MTPModel:
    return MTPModel(tiny_base(kind, **overrides), name="tiny")


def collect(generate: Any, prompts: list[list[int]] = PROMPTS, **options: Any):
    options = {"max_tokens": 24, "stops": [[5], [6, 7]], "batch_size": 4} | options
    found = {index: (ids, why) for index, ids, why in generate(prompts, **options)}
    assert len(found) == len(prompts)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gives_the_ids_that_mlx_gives(kind):
    model = tiny(kind)
    generate = TorchGenerator(model, dtype=torch.float32, device="cpu")
    expected = collect(lambda *args, **options: generate_batch(model, *args, **options))
    assert collect(generate) == expected
    assert {why for _, why in expected.values()} >= {"length"}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_ids_do_not_depend_on_the_batch(kind):
    generate = TorchGenerator(tiny(kind), dtype=torch.float32, device="cpu")
    alone = [collect(generate, [prompt])[0] for prompt in PROMPTS]
    for batch_size in (1, 3, 5, 16):
        found = collect(generate, batch_size=batch_size)
        assert [found[index] for index in range(len(PROMPTS))] == alone


def test_few_rows_wait_for_the_next_batch_and_join_it(monkeypatch):
    """A batch of which one row is left is continued with the rows of the next one."""
    from mlx_mtp.backends.pytorch import generation

    generate = TorchGenerator(tiny(), dtype=torch.float32, device="cpu")
    prompts = [[(3 * i + n) % 60 for i in range(4 + n // 10)] for n in range(40)]
    expected = collect(generate, prompts, batch_size=1, loop_length=6, max_tokens=80)
    joined = []
    join = generation._Batch.join
    monkeypatch.setattr(
        generation._Batch, "join", lambda self, o: (joined.append(len(self.rows)), join(self, o))
    )
    monkeypatch.setattr(generation, "_FEW", 0.5)
    assert collect(generate, prompts, batch_size=10, loop_length=6, max_tokens=80) == expected
    assert any(joined)  # not only the first part of a new batch


def test_bfloat16_takes_the_most_likely_ids_up_to_rounding():
    """Each id is the best one, or nearly, for MLX's float32 model after the same text."""
    model = tiny()
    generate = TorchGenerator(model, dtype=torch.bfloat16, device="cpu")
    right = total = 0
    for index, (ids, _) in collect(generate).items():
        text = PROMPTS[index] + ids
        logits = np.array(model.base(mx.array([text])))[0, len(PROMPTS[index]) - 1 : -1]
        best = logits.max(axis=-1)
        chosen = logits[np.arange(len(ids)), ids]
        assert (best - chosen <= 0.2 * logits.std()).all()
        right, total = right + int((best == chosen).sum()), total + len(ids)
    assert total > 100 and right >= 0.9 * total


def test_drawn_ids_have_numbers_of_their_own():
    """A draw gets the logits of its row, and the other rows do not change what it does."""
    generate = TorchGenerator(tiny(), dtype=torch.float32, device="cpu")

    def draws(numbers: list[int]) -> list[Any]:
        return [Draw(0, number, "prompt", temp=1.0) for number in numbers]

    numbers = list(range(len(PROMPTS)))
    together = collect(generate, draws=draws(numbers))
    for number in numbers:
        assert collect(generate, [PROMPTS[number]], draws=draws([number]))[0] == together[number]
    assert together != collect(generate, draws=draws(numbers[::-1]))


def test_a_text_ends_before_it_repeats_itself():
    model = tiny()
    generate = TorchGenerator(model, dtype=torch.float32, device="cpu")
    options = {"loop_length": 4, "max_tokens": 120, "stops": []}
    found = collect(generate, **options)
    assert found == collect(lambda *a, **o: generate_batch(model, *a, **o), **options)
    looped = [ids for ids, why in found.values() if why == "loop"]
    assert looped
    for ids in looped:
        runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        assert len(set(runs)) == len(runs)


def test_memory_limits_the_batch():
    generate = TorchGenerator(tiny(), dtype=torch.float32, device="cpu")
    assert generate.dtype == "float32"
    assert generate.max_batch_size(100) == 128
    assert generate.max_batch_size(10**9) == 8


def test_models_that_pytorch_does_not_compute_are_refused():
    with pytest.raises(ValueError, match="PyTorch cannot run tiny"):
        TorchGenerator(MTPModel(tiny_base("qwen3_moe"), name="tiny"))
