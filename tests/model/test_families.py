"""Families whose shape differs from Llama's: per-layer embeddings, shared or chunked caches, other
names, learned positions, heads in the backbone, language models in vision-language ones.

Plain ids are mlx-lm's, drafts change nothing, and mask rows are what a plain model would compute.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation.forward import FixedCaches, mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.lab.tiny_models import tiny_model
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.lora import GatedLoRALinear
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MASK_PER_LAYER_EMBEDDINGS, MTPModel
from mlx_mtp.model.parts import find_parts, module_at, text_model
from mlx_mtp.train.gradient.adapter import adapter_tensors, new_adapter, trainable
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.families import family_base, family_mtp
from tests.helpers.scripted import ScriptedModel, mixed
from tests.helpers.tiny import step_ids

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]  # longer than windows and chunks
SCALED = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_kv_shared_layers": 2},
    "llama4": {"floor_scale": 4},  # scales queries from position 4 on
    "ministral3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **SCALED}},
    "mistral4": {
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, **SCALED}
    },
}
FAST = ["gemma3n", "gemma4_text", "afm7", "llama4", "gpt2", "nanochat"]
SLOW = [
    *("dbrx", "exaone", "gemma3", "gemma4", "gpt_bigcode", "gpt_neox", "internlm2"),
    *("iquestloopcoder", "kimi_k25", "kimi_vl", "llama4_text", "minimax", "ministral3", "mistral3"),
    *("mistral4", "openelm", "pixtral", "plamo", "qwen", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("stablelm", "talkie", "lille-130m", "phixtral"),
]
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.soak) for name in SLOW)]
LAYOUTS = [StepLayout(1, 3, (2, 0, 1, 3)), StepLayout(3, 1, (1, 2))]


def mtp(family: str, **options: Any) -> MTPModel:
    return family_mtp(family, **OVERRIDES.get(family, {}), **options)


def stock(family: str) -> Any:
    return family_base(family, **OVERRIDES.get(family, {}))


def ordinary_ids(layout: StepLayout) -> list[int]:
    return [(7 + 11 * row) % 64 for row in range(layout.num_ordinary)]


def step_hidden(model: MTPModel, ids: mx.array, layout: StepLayout) -> mx.array:
    """Final hidden states ``[rows, D]`` of a step after the prompt."""
    cache = model.make_cache()
    model(mx.array([PROMPT]), cache=cache)
    return model(ids, cache=cache, layout=layout)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_mlx_lm(family: str) -> None:
    count = 12
    steps = generate_step(mx.array(PROMPT), stock(family), max_tokens=count)
    expected = [int(token) for token, _ in steps]
    model = mtp(family)
    drafted = ScriptedModel(model, mixed([*PROMPT, *expected], seed=1))
    cases: list[tuple[str, Any, int]] = [
        *(("plain", model, 4), ("linear", drafted, 3)),
        *(("quadratic", drafted, 64), ("quadratic", model, 64)),
    ]
    for layout, each, chunk in cases:
        results: Any = decode(
            each, PROMPT, layout=layout, max_tokens=count, prefill_step_size=chunk
        )
        ids = [token for step in results for token in step.tokens]
        assert ids == expected, (layout, each)


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_rows_equal_a_plain_sequence(family: str) -> None:
    model = mtp(family, adapter_scale=0.1)
    plain, fused = MTPModel(stock(family)), MTPModel(stock(family))
    modules: dict[str, Any] = dict(fused.base.named_modules())
    for path, module in model.base.named_modules():
        if isinstance(module, GatedLoRALinear):
            product = module.scale * (module.lora_a @ module.lora_b).T
            modules[path].weight = modules[path].weight + product
    for path in (model.parts.embedding, model.parts.per_layer):
        if path is not None:
            modules[path].weight = module_at(model.base, path).mask_embeddings
    for layout in LAYOUTS:
        ordinary = ordinary_ids(layout)
        hidden = step_hidden(model, step_ids(layout, ordinary), layout)
        start = layout.gate_split
        for group, count in enumerate(layout.mask_counts):
            if count == 0:
                continue
            caches: Any = FixedCaches(make_prompt_cache(plain.base))
            ids = [*PROMPT, *ordinary[: layout.num_pending + group]]
            plain(mx.array([ids]), cache=caches)
            expected = fused(mx.arange(count)[None], cache=caches)[0]
            found = hidden[start : start + count]
            error: Any = mx.abs(found - expected).max() / mx.abs(expected).max()
            assert error.item() < 3e-5, (layout, group)
            start += count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_changes_exactly_the_rows_that_may_see_it(family: str) -> None:
    layout, model = LAYOUTS[0], mtp(family)
    ids = step_ids(layout, ordinary_ids(layout))
    hidden, sees = step_hidden(model, ids, layout), np.array(layout.attention)
    for row in range(layout.num_rows):
        limit = model.vocab_size if row < layout.gate_split else model.num_draft_tokens
        changed_ids = mx.array(ids)
        changed_ids[0, row] = (ids[0, row] + 1) % limit
        changed = (step_hidden(model, changed_ids, layout) != hidden).any(axis=-1)
        assert np.array(changed).tolist() == sees[:, row].tolist(), f"row {row}"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_are_the_rows_of_decoding(family: str) -> None:
    model, k, rows = mtp(family), 4, MaskRows((3, 7, 8, 14), 4)
    ids = mx.array(np.random.default_rng(0).integers(0, 60, 20))
    packed = mask_rows(model, ordinary_rows(model, ids), rows).reshape(-1, k, model.hidden_size)
    for index, anchor in enumerate(rows.anchors):
        layout = StepLayout(anchor + 1, 0, (k,))
        step = mx.concatenate([ids[: anchor + 1], mx.arange(k)])[None]
        single = model(step, cache=model.make_cache(), layout=layout)[0, anchor + 1 :]
        error: Any = mx.abs(single - packed[index]).max() / mx.abs(single).max()
        assert error.item() < 1e-4


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("longcat_flash_ngram", {}, "its embeddings are of n-grams"),
        ("plamo3", {}, "its mask has a window of 7 rows, while its cache stores 6"),
        ("nemotron-nas", {}, "layer 1 does not use its cache"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(
    family: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{family}.* cannot be used: {message}"):
        MTPModel(tiny_model(family, **overrides))


class TestTextModel:
    @pytest.mark.parametrize(
        ("family", "kind"),
        [("kimi_k25", "deepseek_v3"), ("llama4", "llama4_text"), ("gemma3", "gemma3_text")],
    )
    def test_it_has_what_other_models_have(self, family: str, kind: str) -> None:
        outer = stock(family)
        text = text_model(outer)
        assert text.model_type in (kind, family)
        assert len(text.layers) == len(make_prompt_cache(text)) == len(outer.layers)
        assert text.args.vocab_size == 64
        ids = mx.array([PROMPT])
        assert mx.array_equal(text(ids), outer(ids))

    def test_it_is_its_own_text_model(self) -> None:
        text = text_model(stock("kimi_k25"))
        assert text_model(text) is text


class TestParts:
    def test_of_backbones_with_other_names(self) -> None:
        gpt2, lille = find_parts(stock("gpt2")), find_parts(stock("lille-130m"))
        assert (gpt2.backbone, gpt2.embedding) == ("model", "model.wte")
        assert gpt2.positions == ("model.wpe",) and gpt2.head is gpt2.inner_head is None
        assert (lille.backbone, lille.inner_head) == ("transformer", "tok_embeddings")

    def test_rows_of_the_unembedding_rank_as_the_head_does(self) -> None:
        for family in ("gpt_neox", "internlm2", "lille-130m", "gemma3n"):
            model = MTPModel(stock(family))
            hidden = mx.random.normal((2, model.hidden_size), key=mx.random.key(0))
            scores = hidden @ model.unembed_rows(mx.arange(64)).T
            order = mx.argsort(model.logits(hidden[None])[0], axis=-1)
            assert mx.array_equal(mx.argsort(scores, axis=-1), order), family


class TestLearnedPositions:
    def test_the_context_ends_with_the_table(self) -> None:
        assert MTPModel(family_base("gpt2", n_positions=24, n_ctx=24)).max_context == 24

    def test_masks_may_reach_past_it(self) -> None:
        model = family_mtp("gpt2", n_positions=24, n_ctx=24)
        expected = generate_step(
            mx.array(PROMPT), family_base("gpt2", n_positions=24, n_ctx=24), max_tokens=15
        )
        steps: Any = decode(model, PROMPT, layout="quadratic", max_tokens=40)
        ids = [token for step in steps for token in step.tokens]
        assert ids == [int(token) for token, _ in expected]


class TestPerLayerEmbeddings:
    def adapter(self) -> tuple[MTPModel, dict[str, mx.array]]:
        model = mtp("gemma4_text")
        return model, adapter_tensors(trainable(model))

    def test_they_are_tensors_of_the_adapter(self) -> None:
        model, tensors = self.adapter()
        assert tensors[MASK_PER_LAYER_EMBEDDINGS].shape == (4, 4 * 32) == (4, model.per_layer_size)
        again = MTPModel(stock("gemma4_text"), config=model.config, weights=tensors)
        ids = step_ids(LAYOUTS[0], ordinary_ids(LAYOUTS[0]))
        pair = [step_hidden(each, ids, LAYOUTS[0]) for each in (model, again)]
        assert mx.array_equal(pair[0], pair[1])

    def test_without_them_they_are_zero(self) -> None:
        model, tensors = self.adapter()
        zeros = mx.zeros_like(tensors[MASK_PER_LAYER_EMBEDDINGS])
        given = MTPModel(
            stock("gemma4_text"),
            config=model.config,
            weights=tensors | {MASK_PER_LAYER_EMBEDDINGS: zeros},
        )
        del tensors[MASK_PER_LAYER_EMBEDDINGS]
        missing = MTPModel(stock("gemma4_text"), config=model.config, weights=tensors)
        ids = step_ids(LAYOUTS[0], ordinary_ids(LAYOUTS[0]))
        pair = [step_hidden(each, ids, LAYOUTS[0]) for each in (given, missing)]
        assert mx.array_equal(pair[0], pair[1])

    def test_random_tokens_have_their_own(self) -> None:
        model, tensors = self.adapter()
        ids, layout = [9, 33, 2, 60], LAYOUTS[0]
        base = stock("gemma4_text")
        named = MTPModel(base)
        tables = {MASK_EMBEDDINGS: named.parts.embedding}
        tables[MASK_PER_LAYER_EMBEDDINGS] = named.parts.per_layer or ""
        rows = {name: module_at(base, path)(mx.array(ids)) for name, path in tables.items()}
        expected = MTPModel(base, config=model.config, weights=tensors | rows)
        weights = {name: value for name, value in tensors.items() if name not in rows}
        assert model.config is not None
        config = dataclasses.replace(model.config, noise_ids=(1, 64))
        noisy = MTPModel(stock("gemma4_text"), config=config, weights=weights)
        ordinary = ordinary_ids(layout)
        drawn = mx.array([[*ordinary, *(ids[offset] for offset in layout.mask_offsets)]])
        found = step_hidden(noisy, drawn, layout)
        wanted = step_hidden(expected, step_ids(layout, ordinary), layout)
        assert mx.array_equal(found, wanted)
        with pytest.raises(ValueError, match="noise_ids and mask_embeddings"):
            MTPModel(stock("gemma4_text"), config=config, weights=tensors)

    def test_a_wrong_shape_is_named(self) -> None:
        model, tensors = self.adapter()
        tensors[MASK_PER_LAYER_EMBEDDINGS] = mx.zeros((4, 7))
        message = r"mask_per_layer_embeddings must be \(4, 128\), got \(4, 7\)"
        with pytest.raises(ValueError, match=message):
            MTPModel(stock("gemma4_text"), config=model.config, weights=tensors)
        _, others = self.adapter()
        llama = family_mtp("llama")
        weights = adapter_tensors(trainable(llama))
        weights[MASK_PER_LAYER_EMBEDDINGS] = others[MASK_PER_LAYER_EMBEDDINGS]
        with pytest.raises(ValueError, match=r"'?mask_per_layer_embeddings|''"):
            MTPModel(family_base("llama"), config=llama.config, weights=weights)

    def test_a_new_adapter_begins_near_the_mean_and_learns(self) -> None:
        base = MTPModel(stock("gemma4_text"))
        table = module_at(base.base, base.parts.per_layer or "").weight
        model = new_adapter(base, TrainSettings(num_draft_tokens=4, rank=4))
        values = adapter_tensors(trainable(model))[MASK_PER_LAYER_EMBEDDINGS]
        distance: Any = mx.abs(values.mean() - table.mean()) / mx.std(table)
        assert distance.item() < 0.1
        ids = mx.array(np.random.default_rng(0).integers(0, 60, 20))
        ordinary, rows = ordinary_rows(model, ids), MaskRows((3, 8), 4)

        def loss(parameters: Any) -> mx.array:
            model.update(parameters)
            return mask_rows(model, ordinary, rows).square().mean()

        gradients: Any = tree_flatten(mx.grad(loss)(model.trainable_parameters()))
        named = adapter_tensors(dict(gradients))
        assert set(named) >= {MASK_EMBEDDINGS, MASK_PER_LAYER_EMBEDDINGS}
        assert bool((named[MASK_PER_LAYER_EMBEDDINGS] != 0).any())


class TestChunks:
    def test_rewinding_into_the_chunk_before(self) -> None:
        model, rows = MTPModel(stock("llama4")), [*PROMPT, 5, 6, 7, 8, 9, 10]
        cache = model.make_cache()
        model(mx.array([rows]), cache=cache)  # 15 rows; chunks begin at 0, 6 and 12
        cache.rewind(4)
        cache.begin_step()
        again = model(mx.array([[11, 12]]), cache=cache)
        fresh = model.make_cache()
        model(mx.array([rows[:11]]), cache=fresh)
        assert mx.allclose(again, model(mx.array([[11, 12]]), cache=fresh), atol=1e-5)

    def test_rows_out_of_sight_are_dropped_between_steps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mlx_mtp.model.caches.layers.WINDOW_SLACK", 4)
        base = stock("llama4")
        expected = generate_step(mx.array(PROMPT), base, max_tokens=30)
        model = mtp("llama4")
        cache = model.make_cache()
        ids = [int(token) for token, _ in expected]
        drafted: Any = ScriptedModel(model, mixed([*PROMPT, *ids], seed=2))
        steps = decode(drafted, PROMPT, cache=cache, layout="quadratic", max_tokens=30)
        assert [token for step in steps for token in step.tokens] == ids
        layer: Any = cache.layers[0]
        assert layer.dropped > 12 and layer.inner.offset < 20
        assert not cache.can_rewind(layer.inner.offset)

    def test_mlx_lm_takes_the_rows_and_gives_them_back(self) -> None:
        model = MTPModel(stock("llama4"))
        cache = model.make_cache()
        model(mx.array([[*PROMPT, *PROMPT]]), cache=cache)
        expected = model(mx.array([[5]]), cache=cache.copied())
        shared = [cache[index] for index in range(len(cache))]
        assert mx.allclose(
            model.wrap_prompt_cache(shared).layers[0].state[0], shared[0].state[0], atol=0
        )
        logits = stock("llama4")(mx.array([[5]]), cache=shared)
        assert mx.allclose(logits, model.logits(expected), atol=1e-4)


def test_a_window_is_refused_where_layers_count_shared_keys() -> None:
    model = mtp("afm7")
    model.wrap_attention()
    with pytest.raises(ValueError, match="max_kv_size cannot be used with afm7 .*: layers that"):
        model.make_cache(max_kv_size=16)
    for family in ("gemma3n", "gemma4_text"):  # these take the position from the cache
        mtp(family).make_cache(max_kv_size=16)
