"""Fingerprints: one for every function, whatever the spelling of its settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.loading import load
from mlx_mtp.model.base import open_base
from mlx_mtp.model.fingerprint import fingerprint, is_fingerprint_of
from tests.helpers.tiny import save_tiny_model, save_tiny_pair, tiny_base, tiny_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def former(base: Any) -> str:
    """The fingerprint of the first version: type and normalisation weights only."""
    digest = hashlib.sha256(base.model_type.encode())
    parameters: Any = tree_flatten(base.parameters())
    for name, value in sorted(parameters):
        if "norm" in name and value.ndim == 1:
            digest.update(name.encode())
            digest.update(np.array(value.astype(mx.bfloat16).astype(mx.float32)).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_theta": 5e5}),
        ("llama", {"rms_norm_eps": 1e-6}),
        ("llama", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": YARN | {"factor": 8.0}}),
        ("granite", {"residual_multiplier": 0.5}),
        ("gemma3_text", {"sliding_window": 7}),
        ("gemma3_text", {"rope_local_base_freq": 2e4}),
        ("smollm3", {"no_rope_layer_interval": 4}),
        ("mistral", {"sliding_window": 6}),
        ("qwen3_moe", {"rope_scaling": YARN}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
    ],
)
def test_what_changes_the_function_changes_it(tmp_path, kind, changes):
    folder = save_tiny_model(tmp_path / "model", kind)
    before = fingerprint(open_base(folder)[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    base = open_base(folder)[0]
    assert fingerprint(base) != before
    assert former(base) == former(tiny_base(kind, vocab_size=260))


@pytest.mark.parametrize("scaling", [{}, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_the_spelling_of_a_config_does_not(tmp_path, scaling):
    folder = save_tiny_model(tmp_path / "model", **({"rope_scaling": scaling} if scaling else {}))
    prints = {fingerprint(tiny_base(vocab_size=260, rope_scaling=scaling or None))}
    prints.add(fingerprint(open_base(folder)[0]))
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")} | scaling
    config.pop("rope_scaling", None)
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    prints.add(fingerprint(open_base(folder)[0]))
    assert len(prints) == 1


def test_adapters_with_the_former_fingerprint_load(tmp_path):
    model, adapter = save_tiny_pair(tmp_path)
    base = open_base(model)[0]
    assert is_fingerprint_of(base, former(base)) and is_fingerprint_of(base, fingerprint(base))
    assert former(base) != fingerprint(base) and not is_fingerprint_of(base, "")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": former(base)}))
    assert load(str(model), adapter_path=str(adapter))[0].config is not None
    other = tiny_config("llama", vocab_size=260, rope_theta=7.0)
    (model / "config.json").write_text(json.dumps(other))
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_fingerprint": fingerprint(base)})
    )
    with pytest.raises(ValueError, match="fingerprint"):
        load(str(model), adapter_path=str(adapter))
