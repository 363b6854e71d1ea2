"""MTPModel over eleven architectures: ordinary rows keep the base model's bits, rows see what they
may and nothing else, mask rows are what a plain mlx-lm model would compute; the rest is refused.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepLayout, plain_layout
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MTPModel, fingerprint
from tests.helpers.tiny import (
    KINDS,
    random_adapter,
    step_ids,
    tiny_base,
    tiny_mtp,
)

PREFIX = [3, 17, 42, 8, 29, 55, 1, 33, 20]  # longer than the tiny models' windows
LAYOUTS = [
    StepLayout(1, 2, (2, 2, 2)),
    StepLayout(1, 3, (2, 0, 1, 3)),
    StepLayout(3, 1, (1, 2)),
    StepLayout(2, 2, (0, 0, 4)),
]
REFERENCE_LAYOUTS = [*LAYOUTS, StepLayout(4, 0, (3,))]


def ordinary_ids(layout: StepLayout) -> list[int]:
    return [(7 + 11 * row) % 64 for row in range(layout.num_ordinary)]


def with_prefix(model: MTPModel, prefix: list[int] = PREFIX) -> Any:
    cache = model.make_cache()
    model(mx.array([prefix]), cache=cache)
    return cache


def run_step(model: MTPModel, ids: mx.array, layout: StepLayout) -> mx.array:
    """Final hidden states ``[rows, D]`` of a step behind the prefix."""
    hidden = model(ids, cache=with_prefix(model), layout=layout)[0]
    mx.eval(hidden)
    return hidden


def with_adapter(kind: str, **changes: Any) -> MTPModel:
    """A tiny model whose adapter has some tensors replaced: all low-rank ones, or the masks."""
    base = tiny_base(kind)
    config, weights = random_adapter(base)
    for name in weights:
        if "lora" in name and "lora" in changes:
            weights[name] = changes["lora"] * weights[name]
    weights[MASK_EMBEDDINGS] = weights[MASK_EMBEDDINGS] + changes.get("masks", 0)
    return MTPModel(base, config=config, weights=weights)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ordinary_ids_are_the_base_models_bits(kind: str) -> None:
    bare, model, stock = MTPModel(tiny_base(kind)), tiny_mtp(kind), tiny_base(kind)
    caches = bare.make_cache(), model.make_cache()
    stock_cache = make_prompt_cache(stock)
    for ids in (PREFIX, [5], [6, 7, 8], [9]):
        expected = bare.logits(bare(mx.array([ids]), cache=caches[0]))
        layout = plain_layout(num_pending=len(ids))
        logits = model.logits(model(mx.array([ids]), cache=caches[1], layout=layout))
        assert mx.array_equal(logits, expected)
        stock_logits = stock(mx.array([ids]), cache=stock_cache)
        assert mx.allclose(logits, stock_logits, rtol=1e-5, atol=1e-5)
    assert caches[1].offset == len(PREFIX) + 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ordinary_rows_do_not_depend_on_the_adapter(kind: str, layout: StepLayout) -> None:
    ids = step_ids(layout, ordinary_ids(layout))
    model = with_adapter(kind)
    hidden = run_step(model, ids, layout)
    split = layout.gate_split
    for changed in (with_adapter(kind, lora=0.0), with_adapter(kind, masks=1.0)):
        other = run_step(changed, ids, layout)
        assert mx.array_equal(hidden[:split], other[:split])
        assert (hidden[split:] != other[split:]).any(axis=-1).all()  # every mask row did change
        logits, others = model.logits(hidden[None]), changed.logits(other[None])
        assert mx.array_equal(logits[:, :split], others[:, :split])
    stock = tiny_base(kind)
    expected = stock(mx.array([[*PREFIX, *ordinary_ids(layout)]]))[:, len(PREFIX) :]
    assert mx.allclose(model.logits(hidden[None])[:, :split], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_changes_exactly_the_rows_that_may_see_it(kind: str, layout: StepLayout) -> None:
    model = tiny_mtp(kind)
    ids = step_ids(layout, ordinary_ids(layout))
    hidden = run_step(model, ids, layout)
    sees = np.array(layout.attention)
    for row in range(layout.num_rows):
        kinds = model.vocab_size if row < layout.gate_split else model.num_draft_tokens
        changed_ids = mx.array(ids)
        changed_ids[0, row] = (ids[0, row] + 1) % kinds
        changed = (run_step(model, changed_ids, layout) != hidden).any(axis=-1)
        assert np.array(changed).tolist() == sees[:, row].tolist(), f"row {row}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_cached_prefix_is_seen_by_every_row(kind: str) -> None:
    layout, model = LAYOUTS[1], tiny_mtp(kind)
    ids = step_ids(layout, ordinary_ids(layout))
    other_prefix = [*PREFIX[:-1], PREFIX[-1] + 1]
    hidden = run_step(model, ids, layout)
    other = model(ids, cache=with_prefix(model, other_prefix), layout=layout)[0]
    assert (hidden != other).any(axis=-1).all()


def mask_model(kind: str, model: MTPModel, weights: dict[str, mx.array]) -> Any:
    """A stock mlx-lm model that computes mask rows: the low-rank weights are added to the dense
    ones and the embedding table holds the mask embeddings.
    """
    assert model.config is not None
    fused = tiny_base(kind)
    for path, module in fused.named_modules():
        if f"{path}.lora_a" in weights:
            product = weights[f"{path}.lora_a"] @ weights[f"{path}.lora_b"]
            module.weight = module.weight + model.config.scale * product.T
    fused.model.embed_tokens.weight = weights[MASK_EMBEDDINGS]
    return fused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", REFERENCE_LAYOUTS)
def test_mask_rows_equal_a_plain_sequence(kind: str, layout: StepLayout) -> None:
    base = tiny_base(kind)
    config, weights = random_adapter(base, scale_of_weights=0.2)
    stock, model = tiny_base(kind), MTPModel(base, config=config, weights=weights)
    fused = mask_model(kind, model, weights)
    ordinary = ordinary_ids(layout)
    hidden = run_step(model, step_ids(layout, ordinary), layout)
    start = layout.gate_split
    for group, count in enumerate(layout.mask_counts):
        if count == 0:
            continue
        cache = make_prompt_cache(stock)
        stock.model(mx.array([[*PREFIX, *ordinary[: layout.num_pending + group]]]), cache)
        expected = fused.model(mx.arange(count)[None], cache)[0]
        found = hidden[start : start + count]
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5), f"group {group}"
        start += count


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
def test_quantised_models_keep_their_bits_too(kind: str) -> None:
    layout = LAYOUTS[1]
    ids = step_ids(layout, ordinary_ids(layout))
    split = layout.gate_split
    model = tiny_mtp(kind, quantised=True)
    hidden = run_step(model, ids, layout)
    other = run_step(tiny_mtp(kind, quantised=True, scale_of_weights=0.0), ids, layout)
    assert mx.array_equal(hidden[:split], other[:split])
    assert (hidden[split:] != other[split:]).any(axis=-1).all()
    rows = model.unembed_rows(mx.array([3, 60]))
    scores = hidden @ rows.T
    assert mx.allclose(scores * _logit_factor(model), _head(model, hidden)[:, [3, 60]], atol=1e-4)


def _head(model: MTPModel, hidden: mx.array) -> mx.array:
    return model.logits(hidden[None])[0]


def _logit_factor(model: MTPModel) -> float:
    return 1 / getattr(model.base.args, "logits_scaling", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_unembedded_rows_rank_as_the_head_does(kind: str) -> None:
    model = tiny_mtp(kind)
    hidden = run_step(model, mx.array([[5, 6]]), plain_layout(num_pending=2))
    ids = mx.array([9, 0, 63])
    scores = hidden @ model.unembed_rows(ids).T * _logit_factor(model)
    assert mx.allclose(scores, _head(model, hidden)[:, ids], rtol=1e-5, atol=1e-5)


def test_without_an_adapter_nothing_is_wrapped() -> None:
    base = tiny_base("llama")
    before = [type(module) for _, module in base.named_modules()]
    model = MTPModel(base)
    assert [type(module) for _, module in base.named_modules()] == before
    assert model.config is None and model.num_draft_tokens == 0 and model.sampler_head is None


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    """A product with zero would not be zero, and ordinary rows would change."""
    base = tiny_base()
    config, weights = random_adapter(base)
    name = "model.layers.1.mlp.up_proj.lora_b"
    weights[name][2, 3] = value
    with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
        MTPModel(base, config=config, weights=weights)


def test_a_failed_forward_leaves_no_step_behind() -> None:
    model, layout = tiny_mtp("llama"), LAYOUTS[0]
    with pytest.raises(IndexError):
        model(step_ids(layout, ordinary_ids(layout)), cache=MTPCache([]))
    logits = model.logits(model(mx.array([PREFIX]), cache=model.make_cache()))
    assert mx.allclose(logits, tiny_base("llama")(mx.array([PREFIX])), atol=1e-5)


def test_properties() -> None:
    model = tiny_mtp("qwen2", k=3)
    assert (model.num_draft_tokens, model.vocab_size, model.hidden_size) == (3, 64, 32)
    assert model.max_context == 4096 and model.dtype == mx.float32
    quantised = tiny_mtp("qwen2", quantised=True)
    assert (quantised.vocab_size, quantised.hidden_size) == (64, 32)


def test_fingerprints_tell_models_apart_but_not_quantisations() -> None:
    prints = {fingerprint(tiny_base(kind)) for kind in KINDS}
    assert len(prints) == len(KINDS)
    assert fingerprint(tiny_base("llama", seed=1)) != fingerprint(tiny_base("llama"))
    assert fingerprint(tiny_base("llama", quantised=True)) == fingerprint(tiny_base("llama"))
    half = tiny_base("llama")
    half.apply(lambda x: x.astype(mx.bfloat16))
    assert fingerprint(half) == fingerprint(tiny_base("llama"))
    model = tiny_mtp("llama")
    assert model.config is not None
    assert model.config.base_fingerprint == fingerprint(tiny_base("llama"))


def test_a_rotary_embedding_that_depends_on_the_length_is_refused() -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    base = tiny_base("llama", rope_scaling=scaling)
    config, weights = random_adapter(base)
    with pytest.raises(ValueError, match="cannot take mask rows: "):
        MTPModel(base, config=config, weights=weights)
    MTPModel(tiny_base("llama", rope_scaling=scaling))  # decodes plainly
