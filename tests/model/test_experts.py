"""Adapters on attention, on shared parts or on experts: drafts stay exact, whatever the weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation.forward import mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.experts import GatedExperts, GatedLoRASwitchLinear
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import adapter_tensors, target_layers, trainable
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.families import family_base, family_mtp
from tests.helpers.scripted import ScriptedModel, mixed
from tests.helpers.tiny import step_ids

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
GEMMA4 = {"enable_moe_block": True, "hidden_size_per_layer_input": 0}
OVERRIDES: dict[str, dict[str, Any]] = {"gemma4_text": GEMMA4}
FAST = [("gpt_oss", "mxfp4"), ("qwen3_moe", "affine"), ("llama4", None), ("glm4_moe", None)]
SLOW = [
    (family, mode)
    for family in (
        *("gpt_oss", "qwen3_moe", "llama4", "glm4_moe", "glm4_moe_lite", "deepseek_v2"),
        *("deepseek_v3", "minimax", "mixtral", "gemma4_text", "kimi_k25", "phixtral"),
    )
    for mode in (None, "affine", "mxfp4")
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.soak) for case in SLOW)]


def mtp(family: str, **options: Any) -> MTPModel:
    return family_mtp(family, **OVERRIDES.get(family, {}), **options)


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_greedy_ids_are_those_of_mlx_lm(family: str, mode: str | None) -> None:
    count = 12
    base = family_base(family, mode=mode, **OVERRIDES.get(family, {}))
    expected = [int(token) for token, _ in generate_step(mx.array(PROMPT), base, max_tokens=count)]
    model: Any = mtp(family, mode=mode, adapt="all")
    drafted: Any = ScriptedModel(model, mixed([*PROMPT, *expected], seed=1))
    for layout, each in (("linear", drafted), ("quadratic", drafted), ("quadratic", model)):
        results: Any = decode(each, PROMPT, layout=layout, max_tokens=count)
        assert [token for step in results for token in step.tokens] == expected, layout


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_only_mask_rows_are_adapted(family: str, mode: str | None) -> None:
    layout = StepLayout(1, 3, (4, 4, 4, 4))  # 20 rows, enough for mlx-lm to sort rows by expert
    ids = step_ids(layout, [7, 18, 29, 40])

    def hidden(seed: int) -> mx.array:
        model = mtp(family, mode=mode, adapt="all", adapter_seed=seed)
        cache = model.make_cache()
        model(mx.array([PROMPT]), cache=cache)
        return model(ids, cache=cache, layout=layout)[0]

    first, second = hidden(1), hidden(2)
    split = layout.gate_split
    assert mx.array_equal(first[:split], second[:split])
    assert (first[split:] != second[split:]).any(axis=-1).all()


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_training_rows_are_the_rows_of_decoding(family: str, mode: str | None) -> None:
    model, k, rows = mtp(family, mode=mode, adapt="all"), 4, MaskRows((3, 8, 14), 4)
    ids = mx.array(np.random.default_rng(0).integers(0, 60, 20))
    packed = mask_rows(model, ordinary_rows(model, ids), rows).reshape(-1, k, model.hidden_size)
    for index, anchor in enumerate(rows.anchors):
        layout = StepLayout(anchor + 1, 0, (k,))
        step = mx.concatenate([ids[: anchor + 1], mx.arange(k)])[None]
        single = model(step, cache=model.make_cache(), layout=layout)[0, anchor + 1 :]
        error: Any = mx.abs(single - packed[index]).max() / mx.abs(single).max()
        assert error.item() < 1e-4


def test_low_rank_weights_of_an_expert_are_added_to_its_own() -> None:
    model, fused = mtp("qwen3_moe", adapt="all", adapter_scale=0.1), mtp("qwen3_moe", adapt="all")
    switches = {k: x for k, x in model.base.named_modules() if isinstance(x, GatedLoRASwitchLinear)}
    assert len(switches) == 9  # three products in each layer but the first
    owners = {k: x for k, x in model.base.named_modules() if isinstance(x, GatedExperts)}
    path, owner = next(iter(owners.items()))
    plain: Any = dict(fused.base.named_modules())[path].wrapped
    for name in ("gate_proj", "up_proj", "down_proj"):
        adapted, target = switches[f"{path}.{name}"], plain[name].linear
        product = adapted.scale * (adapted.lora_a @ adapted.lora_b)
        target.weight = adapted.linear.weight + product.swapaxes(-1, -2)
    x = mx.random.normal((1, 6, 128), key=mx.random.key(0))
    chosen = mx.array([[[0, 1], [1, 2], [3, 0], [2, 1], [0, 3], [1, 3]]])
    model.scope.layout = MaskRows((0,), 6)
    adapted_rows = owner(x, chosen)
    model.scope.layout = None
    assert mx.allclose(adapted_rows, plain(x, chosen), atol=1e-4)
    assert not mx.allclose(owner(x, chosen), adapted_rows, atol=1e-2)


class TestTargets:
    def layers(self, family: str, adapt: str, **options: Any) -> set[str]:
        base = MTPModel(family_base(family, **OVERRIDES.get(family, {}))).base
        return set(target_layers(base, TrainSettings(adapt=adapt, **options)))

    def test_by_default_experts_are_left_out(self) -> None:
        shared = self.layers("glm4_moe", "shared")
        assert any(".shared_experts." in path for path in shared)
        assert any(".self_attn." in path for path in shared)
        assert not any(".switch_mlp." in path for path in shared)
        assert self.layers("glm4_moe", "attention") == {x for x in shared if ".self_attn." in x}
        experts = self.layers("glm4_moe", "all") - shared
        assert experts and all(".switch_mlp." in path for path in experts)

    def test_routers_are_never_adapted(self) -> None:
        for family in ("gemma4_text", "qwen2_moe", "llama4", "minimax"):
            paths = self.layers(family, "all")
            assert paths and not any("router" in path or path.endswith("gate") for path in paths)

    def test_experts_in_a_list_get_rows_one_by_one_and_are_left_out(self) -> None:
        paths = self.layers("dbrx", "all")
        assert paths and not any(".experts." in path for path in paths)

    def test_names_of_other_families_are_projections_too(self) -> None:
        assert {path.rpartition(".")[-1] for path in self.layers("gpt2", "shared")} == {
            *("c_attn", "c_proj", "c_fc")
        }
        latent = self.layers("deepseek_v3", "attention")
        assert any(path.endswith("q_b_proj") for path in latent)
        named = self.layers("gpt2", "shared", target_modules=("c_attn",))
        assert all(path.endswith("c_attn") for path in named)


def test_a_wrong_number_of_experts_is_named() -> None:
    model = mtp("qwen3_moe", adapt="all")
    tensors = adapter_tensors(trainable(model))
    name = next(name for name in tensors if name.endswith("switch_mlp.up_proj.lora_a"))
    tensors[name] = tensors[name][:3]
    with pytest.raises(ValueError, match="do not fit 4 experts of 128 to"):
        MTPModel(family_base("qwen3_moe"), config=model.config, weights=tensors)
