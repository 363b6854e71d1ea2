"""Logits equal transformers', in both generations of keys, or the folder is refused by name."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.converters.reference.folder import compare_with_pytorch
from mlx_mtp.converters.reference.verify import BOUND
from tests.helpers.tiny import KINDS, save_tiny_model
from tests.helpers.transformers_models import (
    ARCHITECTURES,
    COMMON,
    build,
    build_published,
    error_of_logits,
    rewrite_in_older_keys,
)

LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
ROPES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "default": lambda draw: {},
    "linear": lambda draw: {"factor": draw.choice([1.0, 2.0, 8.0])},
    "dynamic": lambda draw: {"factor": draw.choice([2.0, 4.0])},
    "yarn": lambda draw: {
        "factor": draw.choice([1.0, 4.0, 16.0]),
        "original_max_position_embeddings": draw.choice([16, 64]),
        **draw.choice([{}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 0.5}]),
        **draw.choice([{}, {"mscale": 0.7}, {"mscale_all_dim": 0.5}, {"truncate": False}]),
        **draw.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0}]),
    },
    "llama3": lambda draw: {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": draw.choice([16, 64]),
    },
    "longrope": lambda draw: {
        **LONG,
        "original_max_position_embeddings": draw.choice([32, 64]),
        **draw.choice([{}, {"factor": 3.0}, {"attention_factor": 1.4}]),
    },
}
WINDOW = {"sliding_window": [None, 6, 30, 300]}
ACT = {"hidden_act": ["silu", "silu", "swish", "gelu", "relu", "gelu_pytorch_tanh"]}
GEMMA = {
    "hidden_activation": ["gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu_new", "gelu", "silu"],
    "query_pre_attn_scalar": [8, 16],
    "sliding_window": [6, 30, 300],
    "attention_bias": [False, False, True],
    "use_bidirectional_attention": [False, False, False, True],
}
BIASES = {"attention_bias": [False, False, True], "mlp_bias": [False, False, True]}
UNTIED = {"tie_word_embeddings": [False]}
SOME_LAYERS = {
    "use_sliding_window": [False, True],
    "max_window_layers": [0, 1, 2],
    "layer_types": [None, None, ["sliding_attention", "full_attention"]],
}
PARTIAL = ("phi3", "glm", "glm4", "stablelm", "gpt_neox", "phi", "nemotron")
EVERYWHERE: dict[str, list[Any]] = {
    "rms_norm_eps": [1e-6, 1e-5, 1e-2],
    "tie_word_embeddings": [True, False],
    "num_key_value_heads": [1, 2, 4],
    "attention_dropout": [0.0, 0.1],
    "max_position_embeddings": [32, 256],
}
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "llama": ACT | BIASES | {"head_dim": [8, 16]},
    "mistral": ACT | WINDOW | {"head_dim": [8, 16]},
    "qwen2": ACT | WINDOW | SOME_LAYERS,
    "qwen3": ACT | WINDOW | SOME_LAYERS | {"head_dim": [8, 16], "attention_bias": [False, True]},
    "ministral3": ACT | WINDOW | {"head_dim": [8, 16]},
    "gemma3_text": GEMMA
    | {
        "final_logit_softcapping": [None, None, 5.0],
        "attn_logit_softcapping": [None, None, 5.0],
        "layer_types": [None, ["sliding_attention", "full_attention"] * 3],
    },
    "phi3": ACT | WINDOW | {"head_dim": [8, 8, 16], "resid_pdrop": [0.0, 0.1]},
    "olmo2": ACT | {"attention_bias": [False, True], "head_dim": [8, 16]},
    "smollm3": ACT
    | BIASES
    | WINDOW
    | {"use_sliding_window": [False, True], "no_rope_layers": [None, [1, 0, 0, 1]]},
    "granite": ACT
    | BIASES
    | {"logits_scaling": [1.0, 3.0], "residual_multiplier": [1.0, 0.5], "head_dim": [8, 8, 16]},
    "qwen3_moe": ACT
    | WINDOW
    | {
        "use_sliding_window": [False, True],
        "norm_topk_prob": [True, False],
        "num_experts_per_tok": [1, 2],
        "decoder_sparse_step": [1, 2],
        "attention_bias": [False, False, True],
    },
    "gemma2": GEMMA
    | {
        "final_logit_softcapping": [None, 30.0],
        "attn_logit_softcapping": [None, 50.0],
    },
    "olmo3": ACT | {"attention_bias": [False, True], "sliding_window": [6, 300]},
    "mixtral": ACT | WINDOW | {"head_dim": [None, 16], "num_experts_per_tok": [1, 2]},
    "seed_oss": ACT | {"attention_bias": [True, False], "head_dim": [8, 16]},
    "cohere": ACT | {"logit_scale": [0.0625, 1.0], "use_qk_norm": [False, True]},
    "glm4": ACT | {"attention_bias": [False, True], "head_dim": [8, 16]},
    "glm": ACT | {"attention_bias": [False, True], "head_dim": [8, 16]},
    "stablelm": ACT
    | {
        "use_qkv_bias": [False, True],
        "qk_layernorm": [False, True],
        "use_parallel_residual": [False, True],
    },
    "ernie4_5": ACT | {"use_bias": [False, True], "head_dim": [8, 16]},
    "helium": ACT | BIASES | {"head_dim": [8, 16]},
    "gemma": ACT | {"head_dim": [8, 16], "attention_bias": [False, False, True]},
    "starcoder2": ACT | WINDOW | {"use_bias": [True, False], "norm_epsilon": [1e-5, 1e-2]},
    "gpt_neox": ACT
    | {"use_parallel_residual": [True, False], "attention_bias": [True, True, False]}
    | UNTIED,
    "exaone": ACT | {"head_dim": [8, 16]},
    "cohere2": WINDOW | {"logit_scale": [0.0625, 1.0], "head_dim": [8, 16]},
    "phi": ACT | UNTIED | {"qk_layernorm": [False, True]},
    "nemotron": {"hidden_act": ["relu2", "relu"], **BIASES, "head_dim": [8, 16]},
}


def draw_settings(number: int) -> tuple[str, dict[str, Any]]:
    """Draw an architecture and settings that change what a model computes."""
    draw = random.Random(number)
    kind = list(SETTINGS)[number % len(SETTINGS)]
    choices = EVERYWHERE | SETTINGS[kind]
    names = draw.sample(sorted(choices), draw.randint(1, 4))
    settings = {name: draw.choice(choices[name]) for name in names}
    rope = {"rope_theta": draw.choice([1e3, 1e4, 5e5])}
    name = draw.choice([*ROPES, "default"])
    rope |= {"rope_type": name, **ROPES[name](draw)}
    if kind in PARTIAL or draw.random() < 0.1:
        rope["partial_rotary_factor"] = draw.choice([1.0, 0.5])
    if kind in ("gemma3_text", "olmo3"):
        local = {"rope_type": "default", "rope_theta": draw.choice([1e4, 5e5])}
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    elif kind == "ministral3":
        scale = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
        settings["rope_parameters"] = scale | rope
    else:
        settings["rope_parameters"] = rope
    return kind, settings


def check(kind: str, folder: Path, settings: dict[str, Any]) -> list[str]:
    """Compare both generations; the outcomes are ``equal``, ``refused`` or what is wrong."""
    try:
        expected = build(kind, folder, **settings)
    except Exception:  # transformers itself has no such model
        return ["no model"]
    outcomes = []
    for rewrite in (lambda _: None, rewrite_in_older_keys):
        rewrite(folder)
        try:
            error = error_of_logits(folder, expected)
            outcomes.append("equal" if error <= BOUND else f"error {error:.1e}")
        except ValueError as refusal:
            text = str(refusal)
            names = set(re.findall(r'"(\w+)":', json.dumps(ARCHITECTURES[kind] | settings)))
            names.add("rope_scaling")
            named = any(key in text for key in names)
            outcomes.append("refused" if named and "\n" not in text else f"unnamed: {text}")
    return outcomes


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_generations_compute_what_transformers_computes(tmp_path, kind):
    expected = build(kind, tmp_path)
    assert error_of_logits(tmp_path, expected) <= BOUND
    rewrite_in_older_keys(tmp_path)
    assert error_of_logits(tmp_path, expected) <= BOUND


PUBLISHED = [
    json.loads(line)
    for line in Path(__file__).with_name("published.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["name"].replace(" ", "-"))
def test_published_configurations(tmp_path, config):
    """Keys and values of well-known models, from memory, with tiny sizes."""
    config = {key: value for key, value in config.items() if key != "name"}
    expected = build_published(config, tmp_path)
    assert error_of_logits(tmp_path, expected) <= BOUND
    (tmp_path / "resaved.json").replace(tmp_path / "config.json")
    assert error_of_logits(tmp_path, expected) <= BOUND


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 6}),
        ("phi3", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", **LONG}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    ],
)
@pytest.mark.parametrize("limit", [32, 256])
def test_settings_that_mlx_lm_ignores_are_applied(tmp_path, kind, settings, limit):
    settings = settings | {"max_position_embeddings": limit}
    if kind == "phi3":
        settings["original_max_position_embeddings"] = 32
    if kind == "qwen3_moe" and "rope_parameters" in settings:
        settings["rope_parameters"] |= {"rope_theta": 1e4, "original_max_position_embeddings": 16}
    if limit == 32 and "sliding_window" in settings:
        settings["sliding_window"] = 30
    assert check(kind, tmp_path, {"rope_parameters": {"rope_theta": 1e4}} | settings) == [
        "equal",
        "equal",
    ]


@pytest.mark.parametrize("number", range(8))
def test_random_settings(tmp_path, number):
    kind, settings = draw_settings(number)
    assert set(check(kind, tmp_path, settings)) <= {"equal", "refused", "no model"}, settings


@pytest.mark.soak
def test_many_random_settings(tmp_path):
    outcomes: Counter[str] = Counter()
    wrong, number = [], 0
    while outcomes.total() < 800:  # 400 configurations in both generations
        kind, settings = draw_settings(number)
        found = check(kind, tmp_path / str(number), settings)
        number += 1
        if found != ["no model"]:
            outcomes.update(found)
            wrong += [(kind, settings, found)] if set(found) - {"equal", "refused"} else []
    print(dict(outcomes), "of", number)
    assert not wrong
    assert outcomes["equal"] > 300


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("quantised", [False, True])
def test_folders_of_mlx_lm(tmp_path, kind, quantised):
    folder = save_tiny_model(tmp_path / "model", kind, hidden_size=64, quantised=quantised)
    report = compare_with_pytorch(folder)
    assert report.passed and report.num_rows == 72


def test_the_command(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model", vocab_size=COMMON["vocab_size"])
    arguments = ["verify", "--against-pytorch", "--model", str(folder), "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["against_pytorch"]
    assert report["passed"] and report["max_relative_error"] < BOUND
    assert report["first_difference"] is None

    def other(*args: Any, **options: Any) -> Any:
        model, tokenizer = real(*args, **options)
        model.base.model.norm.weight += 0.5
        return model, tokenizer

    from mlx_mtp.converters.reference import folder as module

    real = module.load
    monkeypatch.setattr(module, "load", other)
    result = CliRunner().invoke(cli, arguments[:-1])
    assert result.exit_code == 1 and "NOT the same as PyTorch" in result.stdout
    assert "first difference: position 0 of a prompt of 64 tokens" in result.stdout


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder = save_tiny_model(tmp_path / "model")
    result = CliRunner().invoke(cli, ["verify", "--against-pytorch", "--model", str(folder)])
    assert result.exit_code == 2 and "mlx-mtp[convert]" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_every_architecture_of_the_tests_is_compared():
    assert set(KINDS) <= set(ARCHITECTURES) and len(ARCHITECTURES) >= 14
    assert "torch" in sys.modules
