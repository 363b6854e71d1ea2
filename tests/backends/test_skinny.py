"""A model whose layers use our kernels says what it said before, in plain and in several tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.layers import (
    KernelEmbedding,
    KernelLinear,
    matmul_operations,
    use_kernels,
)
from mlx_mtp.backends.metal.matmul import Launch
from mlx_mtp.decoding.loop import decode
from mlx_mtp.model.layout import quadratic_layout
from mlx_mtp.model.lora import GatedLoRALinear
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from tests.helpers.kernel_host import run_launch
from tests.helpers.scripted import ScriptedModel, mixed
from tests.helpers.tiny import step_ids, tiny_base, tiny_mtp

PROMPT = [3, 17, 42, 8, 29]
OURS = KernelChoice(ours=True, matrix_from=4, gated=True)
STEP = quadratic_layout(num_pending=1, num_draft_tokens=2, num_masks=2)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels run on the CPU executor; the list fills with what was launched."""
    seen: list[Launch] = []

    def run(launch: Launch) -> mx.array:
        seen.append(launch)
        return run_launch(launch)[0]

    monkeypatch.setattr(kernels, "run", run)
    return seen


def chosen(base: Any, choice: KernelChoice) -> dict[str, KernelChoice]:
    """One choice for every shape of a model."""
    return {operation.name: choice for operation in matmul_operations(base)}


def with_kernels(model: MTPModel, choice: KernelChoice = OURS) -> MTPModel:
    choices = chosen(model.base, choice)
    assert use_kernels(model.base, choices) > 0
    return model


def step_hidden(model: MTPModel, ids: mx.array) -> mx.array:
    """Hidden states of a step behind a prompt."""
    cache = model.make_cache()
    model(mx.array([PROMPT]), cache=cache)
    return model(ids, cache=cache, layout=STEP)


def test_layers_are_replaced_and_hold_the_same_weights():
    model = tiny_mtp(quantised=True)
    before, print_before = model.base.layers[0].mlp.down_proj, fingerprint(model.base)
    with_kernels(model)
    after = model.base.layers[0].mlp.down_proj
    assert isinstance(after, GatedLoRALinear) and isinstance(after.linear, KernelLinear)
    assert after is before and after.linear.weight.shape == before.linear.weight.shape
    assert isinstance(model.base.model.embed_tokens.embedding, KernelEmbedding)
    assert fingerprint(model.base) == print_before


def test_stock_layers_stay_where_they_won():
    model = tiny_mtp(quantised=True)
    choices = chosen(model.base, KernelChoice(ours=False))
    assert use_kernels(model.base, choices) == 0
    assert type(model.base.layers[0].mlp.down_proj.linear) is nn.QuantizedLinear


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_step_has_the_same_hidden_states(kind, launched):
    ids = step_ids(STEP, [7, 11, 23])
    wanted = step_hidden(tiny_mtp(kind, quantised=True), ids)
    model = with_kernels(tiny_mtp(kind, quantised=True))
    found = step_hidden(model, ids)
    mx.eval(found)
    assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    names = [launch.name for launch in launched]
    layers = len(model.base.layers)
    # q, k and v share one first product, and so do gate and up; o and down have their own
    assert names.count("mlx_mtp_gated_lora_down") == 4 * layers
    assert names.count("mlx_mtp_skinny_qmm_matrix_gated") == 7 * layers


@pytest.mark.slow
def test_without_a_gated_kernel_mask_rows_are_adapted_in_plain_operations(launched):
    ids = step_ids(STEP, [7, 11, 23])
    wanted = step_hidden(tiny_mtp(quantised=True), ids)
    choice = KernelChoice(ours=True, matrix_from=4, gated=False)
    found = step_hidden(with_kernels(tiny_mtp(quantised=True), choice), ids)
    assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not any("gated" in launch.name for launch in launched)


@pytest.mark.slow
def test_ordinary_rows_have_the_bits_of_plain_decoding(launched):
    model = with_kernels(tiny_mtp(quantised=True))
    layer: Any = model.base.layers[0].mlp.gate_proj
    x = mx.random.normal((1, STEP.num_rows, layer.linear.weight.shape[1] * 8))
    model.scope.layout = STEP
    many = layer(x)
    model.scope.layout = None
    for row in range(STEP.gate_split):
        assert mx.array_equal(layer(x[:, row : row + 1])[0, 0], many[0, row])
    assert {launch.name for launch in launched} >= {"mlx_mtp_skinny_qmm_scalar"}


@pytest.mark.slow
def test_ids_are_those_of_the_stock_layers(launched):
    stock = tiny_mtp(quantised=True)
    plain = ids(stock, layout="plain")
    model = with_kernels(tiny_mtp(quantised=True))
    assert ids(model, layout="plain") == plain
    drafted = ScriptedModel(model, mixed([*PROMPT, *plain], seed=0))
    for layout in ("linear", "quadratic", "auto"):
        assert ids(drafted, layout=layout) == plain
    assert {launch.template.get("rows") for launch in launched} >= {1}


def ids(model: Any, *, layout: str) -> list[int]:
    steps = decode(model, PROMPT, layout=layout, max_tokens=12, num_draft_tokens=2)
    return [token for step in steps for token in step.tokens]


def test_long_prompts_take_stock_kernels(launched):
    model = with_kernels(tiny_mtp(quantised=True, num_hidden_layers=1))
    mx.eval(model(mx.array([[5] * 33]), cache=model.make_cache()))
    assert not launched


def test_an_untied_head_uses_kernels_too():
    base = tiny_base("olmo2", quantised=True)
    use_kernels(base, chosen(base, OURS))
    assert isinstance(base.lm_head, KernelLinear)
