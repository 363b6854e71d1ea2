"""Which tensors belong to native modules, in the names of every family."""

from __future__ import annotations

import pytest

from mlx_mtp.model.native.names import (
    belongs_to_modules,
    family_of,
    module_indices,
    native_tensors,
    num_modules,
)

MAIN = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
LAYER = ["self_attn.q_proj.weight", "mlp.experts.3.up_proj.weight", "input_layernorm.weight"]
OTHERS = ["embedding_norm", "hidden_norm", "projection", "norm"]
PARTS = {
    "deepseek_v3": ["enorm", "hnorm", "eh_proj", "shared_head.norm"],
    "bailing_moe": ["enorm", "hnorm", "eh_proj", "final_layernorm"],
    "qwen3_next": ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"],
    "mimo": ["token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"],
    "mimo_v2_flash": ["enorm", "hnorm", "eh_proj", "final_layernorm"],
}
PREFIXES = {
    "deepseek_v3": ("model.layers.4.", "model.layers.4."),
    "bailing_moe": ("model.layers.4.", "model.layers.4."),
    "qwen3_next": ("mtp.", "mtp.layers.0."),
    "mimo": ("model.mtp_layers.0.", "model.mtp_layers.0."),
    "mimo_v2_flash": ("model.mtp.layers.0.", "model.mtp.layers.0."),
}


def config(kind: str, **more) -> dict:
    return {"model_type": kind, "num_hidden_layers": 4, **more}


def announcing(kind: str) -> dict:
    """A configuration that announces three modules."""
    return config(kind, num_nextn_predict_layers=3)


@pytest.mark.parametrize("kind", PARTS)
def test_names_of_each_family(kind):
    outer, inner = PREFIXES[kind]
    own = [f"{outer}{part}.weight" for part in PARTS[kind]]
    layer = [f"{inner}{name}" for name in LAYER]
    ordinary = [f"model.layers.3.{name}" for name in LAYER]
    found = native_tensors([*MAIN, *own, *layer, *ordinary], announcing(kind))
    expected = [f"0.{part}.weight" for part in OTHERS] + [f"0.layer.{name}" for name in LAYER]
    assert found == dict(zip([*own, *layer], expected, strict=True))


def test_names_of_ernie():
    names = ["mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_linear_proj.0"]
    found = native_tensors(
        [*MAIN, *(f"model.{name}.weight" for name in names), "model.mtp_linear_proj.0.bias"]
        + ["model.mtp_block.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"],
        config("ernie4_5_moe"),
    )
    assert list(found.values()) == [
        *(f"0.{part}.weight" for part in OTHERS[:3]),
        *("0.projection.bias", "0.layer.mlp.up_proj.weight"),
    ]


@pytest.mark.parametrize(
    ("kind", "name", "canonical"),
    [
        ("deepseek_v3", "model.layers.5.embed_tokens.weight", "1.embedding.weight"),
        ("deepseek_v3", "model.layers.4.shared_head.head.weight", "0.head.weight"),
        ("deepseek_v3", "model.layers.4.eh_proj.weight_scale_inv", "0.projection.weight_scale_inv"),
        ("step3p5", "model.layers.6.transformer.shared_head.output.weight", "2.head.weight"),
        ("step3p5", "model.layers.6.shared_head.norm.weight", "2.norm.weight"),
        (
            "step3p5",
            "model.layers.4.transformer.self_attn.g_proj.weight",
            "0.layer.self_attn.g_proj.weight",
        ),
        (
            "mimo_v2_flash",
            "model.mtp.layers.1.pre_mlp_layernorm.weight",
            "1.layer.post_attention_layernorm.weight",
        ),
        ("qwen3_5", "language_model.mtp.fc.scales", "0.projection.scales"),
        ("qwen3_5", "mtp.layers.0.self_attn.q_norm.weight", "0.layer.self_attn.q_norm.weight"),
        (
            "qwen3_5_moe",
            "language_model.mtp.layers.0.mlp.switch_mlp.up_proj.biases",
            "0.layer.mlp.switch_mlp.up_proj.biases",
        ),
    ],
)
def test_single_names(kind, name, canonical):
    assert native_tensors([name], announcing(kind)) == {name: canonical}


def test_a_layer_that_is_not_announced_is_no_module():
    name = "model.layers.4.enorm.weight"
    assert native_tensors([name], config("deepseek_v3")) == {}
    assert not belongs_to_modules(name, config("deepseek_v3"))


def test_a_text_configuration_inside_another_counts():
    text = config("qwen3_5_text", mtp_num_hidden_layers=1)
    outer = {"model_type": "qwen3_5", "text_config": text, "num_hidden_layers": 99}
    assert num_modules(outer) == 1
    assert native_tensors(["mtp.norm.weight"], outer) == {"mtp.norm.weight": "0.norm.weight"}
    appended = {"model_type": "glm4v_moe", "text_config": announcing("glm4_moe")}
    assert native_tensors(["model.language_model.layers.4.enorm.weight"], appended)


def test_models_without_modules():
    names = [*MAIN, *(f"model.layers.{i}.{name}" for i in range(4) for name in LAYER)]
    for kind in ("deepseek_v3", "qwen3_5", "llama"):
        assert native_tensors(names, config(kind)) == {}
        assert num_modules(config(kind)) == 0
    assert num_modules(config("deepseek_v3", num_nextn_predict_layers=1)) == 1
    assert num_modules(config("deepseek_v3", num_nextn_predict_layers=None)) == 0


def test_modules_of_unsupported_families_are_known_by_name():
    """So a conversion can say what it drops."""
    assert family_of(config("nemotron_h")) is None
    for name in ("mtp.layers.1.mixer.up_proj.weight", "model.mtp.norm.weight"):
        assert native_tensors([name], config("nemotron_h")) == {}
        assert belongs_to_modules(name, config("nemotron_h"))
    assert not belongs_to_modules("model.layers.9.mlp.weight", {"model_type": "gpt2"})


def test_indices():
    assert module_indices(["1.norm.weight", "0.norm.weight", "1.head.weight"]) == [0, 1]
