"""Native modules compute what PyTorch computes from the published weights and equations."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.backends.cpu.float32 import to_float32
from mlx_mtp.lab.tiny_models import tiny_config, tiny_model
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.native.module import NativeModule, build_native_module
from mlx_mtp.model.native.names import num_modules
from mlx_mtp.model.native.published import canonical_tensors, without_copies
from mlx_mtp.model.parts import text_model
from mlx_mtp.train.gradient.adapter import new_adapter
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.native_models import KINDS, Published, fused, publish
from tests.helpers.transformers_models import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="needs torch and transformers")
ROWS = 9  # more than a window has
BOUND = 1e-4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    made: dict[str, Published] = {}

    def get(kind: str) -> Published:
        if kind not in made:
            made[kind] = publish(kind, tmp_path_factory.mktemp(kind))
        for module in made[kind].reference.modules:
            module.rows.clear()
        return made[kind]

    return get


def states(model: Published, count: int = ROWS, seed: int = 5):
    """Random hidden states as the family passes them on, and as ``MTPModel`` returns them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, model.reference.table.shape[1], generator=generator)
    final = hidden
    if model.reference.kind.before_norm:
        final = model.reference.norm(hidden, model.reference.final_norm)
    return hidden, mx.array(final.numpy())[None]


def ids_of(count: int) -> list[int]:
    return [(7 * i + 3) % 90 for i in range(count)]


def error(values: mx.array, expected) -> float:
    return float(np.abs(np.array(values)[0] - expected.numpy()).max())


def built(model: Published, tensors: dict[str, mx.array] | None = None) -> NativeModule:
    if tensors is None:
        tensors = canonical_tensors(model.base, model.tensors, model.config)
    return build_native_module(model.base, tensors, model.config)


def compare(model: Published, native: NativeModule) -> None:
    """Rows of a prompt through all modules, then a chain of three drafts; by their logits."""
    reference, cache, shift = model.reference, native.make_cache(), native.num_modules - 1
    expected, hidden = states(model)
    logits = expected
    for index in range(native.num_modules):
        hidden = native(hidden, mx.array([ids_of(ROWS)]), cache=cache, index=index)
        expected = reference.run(expected, ids_of(ROWS), index=index)
        logits = reference.logits(expected, index=index)
        assert error(native.logits(hidden, index), logits) < BOUND
    hidden, expected = hidden[:, -1:], expected[-1:]
    for index in range(3):
        token = int(logits[-1].argmax())
        assert token == int(native.logits(hidden, index + shift)[0, -1].argmax())
        hidden = native(hidden, mx.array([[token]]), cache=cache, index=index)
        expected = reference.run(expected, [token], index=index)
        logits = reference.logits(expected, index=index)
        assert error(native.logits(hidden, index), logits) < BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_pytorch(kind, published):
    model = published(kind)
    native = built(model)
    assert native.num_modules == num_modules(model.config) == KINDS[kind].count
    compare(model, native)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_logits_equal_those_of_the_same_weights_in_pytorch(kind, bits, published):
    model = published(kind)
    tensors = canonical_tensors(model.base, model.tensors, model.config)
    layers = [
        name.removeprefix("predictors.")
        for name, layer in built(model, tensors).named_modules()
        if hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0
    ]
    assert len(layers) >= 6
    rounded = {}
    for name in layers:
        parts = mx.quantize(tensors.pop(f"{name}.weight"), 32, bits)
        names = [f"{name}.{leaf}" for leaf in ("weight", "scales", "biases")]
        tensors |= dict(zip(names, parts, strict=True))
        rounded[f"{name}.weight"] = mx.dequantize(*parts, 32, bits)
    original = model.reference
    try:
        model.reference = copy.deepcopy(original)
        model.reference.set(rounded)
        native = built(model, tensors)
        compare(model, native)
    finally:
        model.reference = original
    kinds = {type(layer).__name__ for layer in native.modules() if hasattr(layer, "bits")}
    assert "QuantizedLinear" in kinds


@pytest.mark.parametrize("kind", KINDS)
def test_rewinding_equals_a_fresh_cache(kind, published):
    model = published(kind)
    native, (_, hidden) = built(model), states(model, 30)
    ids = mx.array([ids_of(30)])

    def run(cache, start, end):
        return native(hidden[:, start:end], ids[:, start:end], cache=cache)

    fresh, cache = native.make_cache(), native.make_cache()
    for start in range(0, 20, 4):
        run(fresh, start, start + 4)
        run(cache, start, start + 4)
        guess = native(hidden[:, 25:26], ids[:, 7:8], cache=cache)  # a draft that is rejected
        native(guess, ids[:, 8:9], cache=cache)
        cache.layers[0].rewind(2)
        cache.begin_step()
        fresh.begin_step()
    assert cache.layers[0].offset == fresh.layers[0].offset == 20
    assert mx.array_equal(run(cache, 20, 30), run(fresh, 20, 30))


def test_rows_are_causal(published):
    for kind in ("deepseek_v3", "qwen3_5", "exaone_moe"):
        model = published(kind)
        native, (_, hidden) = built(model), states(model)
        ids = mx.array([ids_of(ROWS)])
        together = native(hidden, ids, cache=native.make_cache())
        cache = native.make_cache()
        rows = [native(hidden[:, i : i + 1], ids[:, i : i + 1], cache=cache) for i in range(ROWS)]
        assert mx.allclose(together, mx.concatenate(rows, axis=1), atol=1e-4)


def test_published_forms_of_experts_and_prefixes_are_the_same_module(published):
    for kind, prefix in (("qwen3_5_moe", "mtp."), ("glm4_moe", "model.")):
        model = published(kind)
        expected = canonical_tensors(model.base, model.tensors, model.config)
        stacked = {name: value for name, value in model.tensors.items() if ".experts." not in name}
        start = next(name for name in model.tensors if ".experts." in name)
        start = start.partition(".experts.")[0]
        for part in ("gate_proj", "up_proj", "down_proj"):
            own = expected[f"0.layer.mlp.switch_mlp.{part}.weight"]
            stacked[f"{start}.switch_mlp.{part}.weight"] = own
        for tensors in (fused(model.tensors), stacked):
            prefixed = {f"language_model.{name}": value for name, value in tensors.items()}
            for each in (tensors, prefixed):
                assert all(prefix in name for name in each)
                found = canonical_tensors(model.base, each, model.config)
                assert found.keys() == expected.keys()
                assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_a_projection_that_was_published_transposed(published):
    model = published("ernie4_5_moe")
    expected = canonical_tensors(model.base, model.tensors, model.config)
    name = "model.mtp_linear_proj.0.weight"
    tensors = model.tensors | {name: model.tensors[name].T}
    found = canonical_tensors(model.base, tensors, model.config)
    assert mx.array_equal(found["0.projection.weight"], expected["0.projection.weight"])


def test_norms_that_were_converted_stay(published):
    for kind in ("qwen3_next", "qwen3_5", "step3p5"):
        model = published(kind)
        tensors = canonical_tensors(model.base, model.tensors, model.config)
        converted = {
            name: value + 1 if "norm" in name else value for name, value in model.tensors.items()
        }
        again = canonical_tensors(model.base, converted, model.config)
        assert all(mx.allclose(again[name], tensors[name]) for name in tensors)


def test_copies_of_the_models_own_tables_are_left_out(published):
    model = published("deepseek_v3")
    tensors = canonical_tensors(model.base, model.tensors, model.config)
    kept, dropped = without_copies(model.base, tensors)
    assert sorted(dropped) == ["0.embedding.weight", "1.embedding.weight"]  # heads differ
    assert kept.keys() == tensors.keys() - set(dropped)
    head = {"0.head.weight": model.base.lm_head.weight, "0.norm.weight": mx.ones(64)}
    assert without_copies(model.base, head)[1] == ["0.head.weight"]
    compare(model, built(model, kept))


def test_no_parameters_of_the_model_are_its_own(published):
    model = published("qwen3_5")
    names = dict(tree_flatten(built(model).parameters()))
    assert all(name.startswith("predictors.0.") for name in names)
    assert len(names) == len(model.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("0.layer.self_attn.q_proj.weight"), "0.layer.self_attn.q_proj.weight is"),
        (lambda x: x.pop("0.projection.weight"), "0.projection.weight is missing"),
        (lambda x: x.update({"0.layer.extra.weight": x["0.norm.weight"]}), "0.layer.extra.weight"),
        (
            lambda x: x.update({"0.projection.weight": mx.zeros((64, 64))}),
            "(64, 64), not (64, 128)",
        ),
        (lambda x: x.update({"2.norm.weight": x["0.norm.weight"]}), "numbers from 0, got [0, 2]"),
        (lambda x: x.update({"0.projection.scales": mx.zeros((64, 3))}), "no quantisation"),
        (lambda x: x.clear(), "got []"),
    ],
)
def test_wrong_tensors_are_named_in_one_line(change, message, published):
    model = published("qwen3_5")
    tensors = canonical_tensors(model.base, model.tensors, model.config)
    change(tensors)
    with pytest.raises(ValueError) as caught:
        built(model, tensors)
    text = str(caught.value)
    assert message in text and "\n" not in text


def test_an_expert_that_is_missing_is_reported(published):
    model = published("qwen3_next")
    tensors = dict(model.tensors)
    del tensors["mtp.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"up_proj.*missing"):
        canonical_tensors(model.base, tensors, model.config)


UNCOMPARED = ("bailing_moe", "bailing_hybrid", "bailing_moe_v3", "mimo_v2_flash", "solar_open")


@pytest.mark.parametrize("family", UNCOMPARED)
def test_families_without_a_reference_load_and_run(family):
    """From tensors of a layer as mlx-lm names them; only the names and shapes are checked."""
    base, config = tiny_model(family), tiny_config(family) | {"num_nextn_predict_layers": 1}
    fitting = [x for x in base.layers if not getattr(x, "is_linear", False)]
    fitting = [x for x in fitting if getattr(x, "is_global", True)]
    layer = base.layers[1] if family == "mimo_v2_flash" else fitting[-1]  # 1 has a window
    start = "model.mtp.layers.0." if family == "mimo_v2_flash" else "model.layers.4."
    parameters: Any = tree_flatten(layer.parameters())
    tensors: dict[str, mx.array] = {f"{start}{name}": value for name, value in parameters}
    tensors |= {f"{start}{name}.weight": mx.ones(128) for name in ("enorm", "hnorm")}
    tensors[f"{start}eh_proj.weight"] = mx.ones((128, 256)) / 256
    tensors[f"{start}final_layernorm.weight"] = mx.ones(128)
    native = build_native_module(base, canonical_tensors(base, tensors, config), config)
    cache, hidden = native.make_cache(), mx.ones((1, ROWS, 128))
    first = native(hidden, mx.array([ids_of(ROWS)]) % 64, cache=cache)
    cache.rewind(3)
    again = native(hidden[:, 6:], mx.array([ids_of(ROWS)])[:, 6:] % 64, cache=cache)
    assert mx.allclose(first[:, 6:], again, atol=1e-5)
    assert native.logits(again).shape == (1, 3, 64)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5", "exaone_moe"])
def test_a_model_that_was_wrapped_before(kind, published):
    model = published(kind)
    _, hidden = states(model)
    ids = mx.array([ids_of(ROWS)])
    native = built(model)
    plain = native.logits(native(hidden, ids, cache=native.make_cache()))
    base = copy.deepcopy(text_model(model.base))
    wrapped = new_adapter(MTPModel(base), TrainSettings(num_draft_tokens=2, rank=4))
    tensors = canonical_tensors(wrapped.base, model.tensors, model.config)
    wrapped.native = build_native_module(wrapped.base, tensors, model.config)
    again = wrapped.native(hidden, ids, cache=wrapped.native.make_cache())
    assert mx.allclose(wrapped.native.logits(again), plain, atol=1e-5)


def test_float32_layers_of_a_cpu_device(published):
    model = published("qwen3_5")
    native = built(model)
    nn.quantize(native, 32, 8)
    _, hidden = states(model)
    ids = mx.array([ids_of(ROWS)])
    quantised = native.logits(native(hidden, ids, cache=native.make_cache()))
    to_float32(native)
    parameters = dict(tree_flatten(native.parameters()))
    assert all(value.dtype == mx.float32 for value in parameters.values())
    logits = native.logits(native(hidden, ids, cache=native.make_cache()))
    assert mx.allclose(logits, quantised, atol=1e-4)


def test_the_type_is_that_of_the_model(published):
    model = published("qwen3_next")
    base = copy.deepcopy(model.base)
    base.set_dtype(mx.bfloat16)
    tensors = canonical_tensors(base, model.tensors, model.config)
    native = build_native_module(base, tensors, model.config)
    out = native(mx.ones((1, 2, 64), mx.bfloat16), mx.array([[1, 2]]), cache=native.make_cache())
    assert out.dtype == native.logits(out).dtype == mx.bfloat16
