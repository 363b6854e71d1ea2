"""Adapters whose mask rows are random tokens, against a rewrite of Uno's cycle of two forwards."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from mlx_mtp.decoding.batching import can_batch
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.evaluation.forward import mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.noise import draw_ids
from tests.helpers.tiny import random_adapter, tiny_base

VOCAB = 12  # so few that some proposals of random weights are accepted
NOISE = (1, 11)
PROMPT = [5, 9, 3, 2, 7, 10, 8]


def noisy(kind: str, *, k: int, seed: int = 0) -> tuple[MTPModel, Any, Any]:
    """A model with random low-rank weights, its base, and a copy with the weights merged."""
    base = tiny_base(kind, seed=seed, vocab_size=VOCAB)
    plain, merged = copy.deepcopy(base), copy.deepcopy(base)
    config, weights = random_adapter(base, k=k, sampler=False, scale_of_weights=0.1)
    del weights["mask_embeddings"]
    weights.pop("mask_per_layer_embeddings", None)
    modules = dict(merged.named_modules())
    added = []
    for name in [name for name in weights if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        product = weights[name] @ weights[f"{path}.lora_b"]
        added.append((f"{path}.weight", modules[path].weight + config.scale * product.T))
    merged.update(tree_unflatten(added))
    config = dataclasses.replace(config, noise_ids=NOISE)
    return MTPModel(base, name=kind, config=config, weights=weights), plain, merged


class Uno:
    """The cycle of arXiv 2609.04010 with greedy acceptance, by mlx-lm's own models and caches.

    A cycle drafts by ``[seed, noise ...]``, whose noise rows have the low-rank weights, and
    verifies ``[sure token, proposals ...]``.
    """

    def __init__(self, plain: Any, merged: Any, *, k: int) -> None:
        self.plain, self.merged, self.k = plain, merged, k

    def cycle(self, text: list[int]) -> tuple[list[int], list[int]]:
        """Proposals after a text that ends in the seed, and the tokens that the cycle commits."""
        cache: Any = make_prompt_cache(self.plain)
        sure = int(self.plain(mx.array([text]), cache=cache)[0, -1].argmax().item())
        positions = np.arange(len(text), len(text) + self.k)
        noise = draw_ids(positions, low=NOISE[0], high=NOISE[1])
        drafted = self.merged(mx.array([noise.tolist()]), cache=cache)[0].argmax(axis=-1)
        proposals: Any = drafted.tolist()
        trim_prompt_cache(cache, self.k)
        checked: Any = self.plain(mx.array([[sure, *proposals]]), cache=cache)[0]
        checked = checked.argmax(axis=-1).tolist()
        count = 0
        while count < self.k and proposals[count] == checked[count]:
            count += 1
        return proposals, [sure, *proposals[:count], checked[count]]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_every_step_proposes_what_unos_cycle_proposes(kind: str, k: int) -> None:
    model, plain, merged = noisy(kind, k=k)
    request = make_request(model, PROMPT, max_tokens=60, layout="quadratic", lookup=False)
    uno, num_steps, num_accepted, expected = Uno(plain, merged, k=k), 0, 0, None
    while request.room > 2 * k:  # near the limit there are fewer masks
        [outcome] = run(model, [request.plan()])
        text = [*request.ids, *outcome.tokens]
        request.commit(outcome)
        if expected is not None:  # what the cycle commits after its sure token, this step emits
            assert outcome.tokens == expected
        proposals, committed = uno.cycle(text[:-1])
        assert committed[0] == text[-1]
        assert outcome.drafts.ids() == proposals
        expected = committed[1:]
        num_steps, num_accepted = num_steps + 1, num_accepted + outcome.num_accepted
    assert num_steps >= 30 and num_accepted >= 5


def test_drafts_do_not_change_the_text() -> None:
    model, plain, _ = noisy("llama", k=3)
    expected, cache = [], make_prompt_cache(plain)
    logits = plain(mx.array([PROMPT]), cache=cache)
    for _ in range(40):
        expected.append(int(logits[0, -1].argmax().item()))
        logits = plain(mx.array([expected[-1:]]), cache=cache)
    for layout in ("plain", "linear", "quadratic", "auto"):
        steps = decode(model, PROMPT, max_tokens=40, layout=layout)
        assert [token for step in steps for token in step.tokens] == expected, layout


def test_ids_depend_on_seed_and_position_only() -> None:
    positions = np.arange(10_000)
    ids = draw_ids(positions, low=1, high=11, seed=3)
    assert np.array_equal(ids[7:], draw_ids(positions[7:], low=1, high=11, seed=3))
    counts = np.bincount(ids, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert counts[1:].min() > 900 and counts[1:].max() < 1100  # 3.3 standard deviations
    other = draw_ids(positions, low=1, high=11, seed=4)
    assert 900 < (ids == other).sum() < 1100
    assert draw_ids(positions, low=5, high=6, seed=-1).tolist() == [5] * len(positions)


def drafts_of(request: Request, model: MTPModel) -> list[list[int]]:
    drafts = []
    while not request.finished:
        [outcome] = run(model, [request.plan()])
        request.commit(outcome)
        drafts.append(outcome.drafts.ids())
    return drafts


def test_the_same_seed_gives_the_same_drafts() -> None:
    model, _, _ = noisy("llama", k=3)
    options: Any = {"max_tokens": 20, "layout": "quadratic", "lookup": False}
    first, again, other = (
        drafts_of(make_request(model, PROMPT, seed=seed, **options), model) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_batched_answers_draft_as_alone() -> None:
    model, _, _ = noisy("llama", k=3)
    assert can_batch(model)

    def requests() -> list[Request]:
        options: Any = {"max_tokens": 12, "layout": "quadratic", "lookup": False}
        return [make_request(model, PROMPT[:size], **options) for size in (3, 7)]

    alone = [drafts_of(request, model) for request in requests()]
    together: list[list[list[int]]] = [[], []]
    pair = requests()
    while not any(request.finished for request in pair):
        for drafts, request, outcome in zip(
            together, pair, run(model, [request.plan() for request in pair]), strict=True
        ):
            request.commit(outcome)
            drafts.append(outcome.drafts.ids())
    for drafts, expected in zip(together, alone, strict=True):
        assert len(drafts) > 5 and drafts == expected[: len(drafts)]


def test_acceptance_is_measured_as_in_decoding() -> None:
    model, _, _ = noisy("llama", k=3)
    [step] = list(decode(model, PROMPT, max_tokens=1, layout="plain"))
    text = [*PROMPT, *step.tokens]
    request = make_request(model, PROMPT, max_tokens=20, layout="quadratic", lookup=False)
    [outcome] = run(model, [request.plan()])
    rows = MaskRows(anchors=(len(PROMPT) - 1,), masks_per_block=3)
    hidden = mask_rows(model, ordinary_rows(model, mx.array(text)), rows)
    drafts: Any = model.logits(hidden[None])[0].argmax(axis=-1).tolist()
    assert outcome.drafts.ids() == drafts
