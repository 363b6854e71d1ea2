"""Bundles and adapters whose layers differ: what converted checkpoints need of loading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.loading import load, read_adapter
from mlx_mtp.model.config import CONFIG_FILE
from mlx_mtp.model.layout import quadratic_layout
from tests.helpers.tiny import save_adapter, save_tiny_model, save_tiny_pair

Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_a_bundle_brings_its_adapter(tmp_path: Path) -> None:
    model_path, adapter_path = save_tiny_pair(tmp_path)
    assert load(str(model_path))[0].config is None
    adapter_path.rename(model_path / "adapter")
    bundled = load(str(model_path))[0]
    assert bundled.config is not None and bundled.sampler_head is not None
    assert load(str(model_path), mtp=False)[0].config is None
    other = save_tiny_pair(tmp_path / "other")[1]
    assert load(str(model_path), adapter_path=str(other))[0].config == bundled.config


def test_a_foreign_adapter_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    (model_path / "adapter").mkdir()
    (model_path / "adapter" / CONFIG_FILE).write_text('{"peft_type": "LORA"}', encoding="utf-8")
    assert load(str(model_path))[0].config is None


def test_layers_may_differ_in_rank_and_scale(tmp_path: Path) -> None:
    """Doubling a scale and halving its weights is the same adapter; so is a rank with zeros."""
    model_path, adapter_path = save_tiny_pair(tmp_path)
    config, weights = read_adapter(adapter_path)
    other = dict(weights)
    other[f"{Q_PROJ}.lora_a"] = mx.pad(weights[f"{Q_PROJ}.lora_a"], [(0, 0), (0, 4)])
    other[f"{Q_PROJ}.lora_b"] = mx.pad(weights[f"{Q_PROJ}.lora_b"] * 0.5, [(0, 4), (0, 0)])
    patterns = {"rank_pattern": {Q_PROJ: 8}, "scale_pattern": {Q_PROJ: 2 * config.scale}}
    changed = dataclasses.replace(config, **patterns)
    second = save_adapter(tmp_path / "second", changed, other)
    hidden = []
    for path in (adapter_path, second):
        model = load(str(model_path), adapter_path=str(path))[0]
        layout = quadratic_layout(num_pending=1, num_draft_tokens=1, num_masks=2)
        ids = mx.array([[65, 66, *layout.mask_offsets.tolist()]])
        hidden.append(model(ids, cache=model.make_cache(), layout=layout))
    assert mx.allclose(hidden[0], hidden[1], atol=1e-5)
    save_adapter(tmp_path / "wrong", dataclasses.replace(changed, rank_pattern={}), other)
    with pytest.raises(ValueError, match=f"{Q_PROJ} has rank 8, not 4"):
        load(str(model_path), adapter_path=str(tmp_path / "wrong"))
