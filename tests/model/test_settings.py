"""What ``config.json`` means: both generations of keys, in those that mlx-lm reads."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_mtp.lab.tiny_models import tiny_config as tiny_family_config
from mlx_mtp.model.settings import read_settings
from tests.helpers.tiny import KINDS, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG_NAMES = ("su", "longrope")


def read(kind: str = "llama", *, without: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    config = {k: v for k, v in tiny_config(kind).items() if k not in without}
    return read_settings(config | changes).config


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_for_mlx_lm_stays_as_it_is(kind):
    assert read(kind) == tiny_config(kind)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "qwen3_moe"])
def test_rope_parameters_become_the_older_keys(kind):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    found = read(kind, without=("rope_theta",), rope_parameters=rope)
    assert found["rope_theta"] == 5e5 and "rope_parameters" not in found
    assert read_settings(found).config == found


def test_scaling():
    rope = {"rope_theta": 5e5, **LLAMA3}
    found = read(without=("rope_theta",), rope_parameters=rope)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {**LLAMA3, "type": "llama3"}
    old = read(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert old["rope_scaling"] == found["rope_scaling"]


def test_transformers_decides_between_contradicting_keys():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert read(rope_theta=1e4, rope_parameters=rope)["rope_theta"] == 5e5
    scaling = {"rope_type": "linear", "factor": 2.0}
    found = read(rope_theta=1e4, rope_scaling=scaling, rope_parameters=rope)
    assert found["rope_theta"] == 1e4 and found["rope_scaling"]["type"] == "linear"
    found = read(rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2.0})
    assert found["rope_scaling"]["type"] == "dynamic"


def test_kinds_of_layers():
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    found = read("gemma3_text", without=("rope_theta",), rope_parameters=rope)
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 2e4)
    assert found["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    found = read("gemma3_text", without=("sliding_window_pattern",), layer_types=kinds)
    assert found["sliding_window_pattern"] == 2


def test_text_config():
    rope = {"rope_type": "default", "rope_theta": 7.0}
    inner = {k: v for k, v in tiny_config("llama").items() if k != "rope_theta"}
    outer = {"model_type": "mistral3", "text_config": inner | {"rope_parameters": rope}}
    assert read_settings(outer).config["text_config"]["rope_theta"] == 7.0
    assert read(text_config={"dtype": "float16"})["text_config"] == {"dtype": "float16"}


def test_an_architecture_that_transformers_does_not_know():
    rope = {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}
    found = read_settings({"model_type": "own", "rope_parameters": rope}).config
    assert found["rope_theta"] == 7.0 and found["rope_scaling"]["type"] == "linear"
    assert read_settings({"model_type": "own"}).config == {"model_type": "own"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rope_scaling", YARN), ("rope_parameters", YARN), ("sliding_window", 6)),
        *(("partial_rotary_factor", 0.5), ("attn_logit_softcapping", 30.0)),
    ],
)
def test_unread_settings_of_an_architecture_that_transformers_does_not_know(key, value):
    config = {"model_type": "qwen", **dict.fromkeys(("hidden_size", "vocab_size"), 8)}
    assert read_settings(config | {"sliding_window": None}).config
    with pytest.raises(ValueError, match="rope_scaling" if "rope" in key else key):
        read_settings(config | {key: value})


def test_the_first_name_of_longrope():
    factors = {"short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]}
    config = tiny_config("phi3", original_max_position_embeddings=64)
    found = [
        read_settings(config | {"rope_scaling": {"type": kind, **factors}}) for kind in LONG_NAMES
    ]
    assert found[0].rope == found[1].rope and found[0].rope is not None
    assert found[0].config == found[1].config


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("qwen2", "hidden_act", "gelu"),
        ("gemma3_text", "hidden_activation", "silu"),
        ("gemma3_text", "final_logit_softcapping", 30.0),
        ("gemma3_text", "layer_types", ["full_attention"] * 2 + ["sliding_attention"]),
        ("qwen3", "attention_bias", True),
        ("granite", "head_dim", 16),
        ("llama", "clip_qkv", 8.0),
        ("llama", "partial_rotary_factor", 0.5),
        ("phi3", "rope_parameters", YARN | {"rope_type": "linear", "rope_theta": 1e4}),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(kind, key, value):
    changed = {"rope_theta": None} if key == "rope_parameters" else {}
    with pytest.raises(ValueError, match=key) as caught:
        read(kind, without=tuple(changed), **{key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"hidden_act": "swish", "unsloth_version": "2025.1", "attention_dropout": 0.1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0}),
        ("mistral", {"sliding_window": 8192}),
        ("phi3", {"resid_pdrop": 0.1, "attention_bias": False, "lm_head_bias": False}),
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
        ("gemma3_text", {"hidden_activation": "gelu_new", "cache_implementation": "hybrid"}),
    ],
)
def test_settings_that_change_nothing_pass(kind, changes):
    found = read_settings(tiny_config(kind, **changes))
    assert found.config == tiny_config(kind, **changes) and not found.windows


def test_windows_of_classes_without_one():
    assert read_settings(tiny_config("mistral", sliding_window=6)).windows == (6, 6)
    changes = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    assert read_settings(tiny_config("qwen2", **changes)).windows == (None, 6)


def test_heads():
    untied = tiny_config("llama", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        read_settings(untied, has_head=False)
    assert read_settings(untied, has_head=True).tied is False
    assert read_settings(tiny_config("llama"), has_head=True).tied is True
    config = {k: v for k, v in untied.items() if k != "tie_word_embeddings"}
    assert read_settings(config, has_head=False).config["tie_word_embeddings"] is True
    assert read_settings(config, has_head=True).config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama4", "llama4_text", {"num_local_experts": 8, "attention_chunk_size": 64}),
        ("gemma3n", "gemma3n_text", {}),
        ("gemma4", "gemma4_text", {"final_logit_softcapping": 30.0}),
        ("kimi_k25", "kimi_k2", {"num_key_value_heads": 4}),
        ("kimi_vl", "deepseek_v3", {"num_key_value_heads": 4}),
        ("pixtral", "mistral", {}),
    ],
)
def test_language_models_in_vision_language_folders_have_their_own_arguments(
    family: str, kind: str, changes: dict[str, Any]
) -> None:
    config = tiny_family_config(family)
    config["text_config"] |= {"model_type": kind, **changes}
    found = read_settings(config).config["text_config"]
    for key in ("num_hidden_layers", "num_attention_heads", "vocab_size", *changes):
        assert found[key] == config["text_config"][key]
