"""Reading checkpoint folders: which files count, what lies beside them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.converters.checkpoint import Checkpoint, read_checkpoint


def _save(path: Path, **tensors: mx.array) -> None:
    mx.save_safetensors(str(path), tensors)


def test_a_peft_folder_is_read_whole(tmp_path: Path) -> None:
    _save(tmp_path / "adapter_model.safetensors", a=mx.ones(2))
    _save(tmp_path / "sampler_model.safetensors", b=mx.zeros(3))
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "tokenizer.json").write_text("not even JSON")
    (tmp_path / "special.json").write_text("[1, 2]")
    (tmp_path / "training_args.bin").write_text("not even a pickle")
    (tmp_path / "optimizer.pt").write_text("not even a pickle")
    (tmp_path / "state.pt").write_text("not even a pickle")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.configs == {"adapter_config.json": {"r": 8}}
    assert {file: list(t) for file, t in checkpoint.files.items()} == {
        "adapter_model.safetensors": ["a"],
        "sampler_model.safetensors": ["b"],
    }
    assert sorted(checkpoint.tensors) == ["a", "b"]


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    _save(tmp_path / "x.safetensors", a=mx.ones(2))
    _save(tmp_path / "y.safetensors", a=mx.ones(2))
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="a is in both x.safetensors and y.safetensors"):
        _ = checkpoint.tensors


@pytest.mark.parametrize("other", ["adapter_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_safetensors_win_over_pytorch_files(tmp_path: Path, other: str) -> None:
    _save(tmp_path / "adapter_model.safetensors", a=mx.ones(2))
    _save(tmp_path / "model-00001-of-00001.safetensors", b=mx.ones(2))
    (tmp_path / other).write_text("never looked at")
    (tmp_path / "pytorch_model.bin.index.json").write_text("never looked at")
    assert sorted(read_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_a_pytorch_file_needs_leave(tmp_path: Path) -> None:
    _save(tmp_path / "adapter_model.safetensors", a=mx.ones(2))
    (tmp_path / "sampler.pt").write_text("x")
    with pytest.raises(ValueError, match="sampler.pt is a PyTorch pickle file: use --allow-pickle"):
        read_checkpoint(tmp_path)


def test_the_second_copy_of_a_sampler_needs_none(tmp_path: Path) -> None:
    """PEFT's example wrote one in each format for a while."""
    _save(tmp_path / "adapter_model.safetensors", a=mx.ones(2))
    _save(tmp_path / "sampler_model.safetensors", b=mx.ones(2))
    (tmp_path / "sampler.pt").write_text("never looked at")
    assert sorted(read_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_a_folder_that_points_on_is_followed(tmp_path: Path) -> None:
    step = tmp_path / "run" / "step-7"
    step.mkdir(parents=True)
    _save(step / "model.safetensors", a=mx.ones(2))
    (step / "config.json").write_text('{"draft_length": 4}')
    (step.parent / "latest.json").write_text('{"latest": "step-7"}')
    assert read_checkpoint(step.parent).configs == {"config.json": {"draft_length": 4}}
    for name in ("../run/step-7", "/", "step-8", 7, None):
        (step.parent / "latest.json").write_text(json.dumps({"latest": name}))
        with pytest.raises(ValueError, match="latest.json names no folder next to it"):
            read_checkpoint(step.parent)
    bundle = tmp_path / "bundle"
    (bundle / "adapter").mkdir(parents=True)
    _save(bundle / "model.safetensors", base=mx.ones(2))
    _save(bundle / "adapter" / "adapter_model.safetensors", a=mx.ones(2))
    (bundle / "adapter" / "adapter_config.json").write_text("{}")
    assert list(read_checkpoint(bundle).tensors) == ["a"]


def test_an_index_must_tell_the_truth(tmp_path: Path) -> None:
    _save(tmp_path / "model-1.safetensors", a=mx.ones(2))
    _save(tmp_path / "model-2.safetensors", b=mx.ones(2))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    assert sorted(read_checkpoint(tmp_path).tensors) == ["a", "b"]
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(ValueError, match="index.json: a is not in model-2.safetensors"):
        read_checkpoint(tmp_path)


def test_a_single_file_brings_the_settings_beside_it(tmp_path: Path) -> None:
    _save(tmp_path / "lora.safetensors", a=mx.ones(2))
    for name in ("lora.json", "config.json", "other.json"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
    checkpoint = read_checkpoint(tmp_path / "lora.safetensors")
    assert sorted(checkpoint.configs) == ["config.json", "lora.json"]


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing does not exist"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="contains no file of tensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "a.gguf").write_text("x")
    with pytest.raises(ValueError, match="a.gguf is neither a folder nor a file of tensors"):
        read_checkpoint(tmp_path / "a.gguf")
    _save(tmp_path / "a.safetensors", a=mx.ones(2))
    (tmp_path / "adapter_config.json").write_text('{"r": ')
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_can_be_made_by_hand() -> None:
    checkpoint = Checkpoint(path=Path("x"), files={"x": {"a": mx.ones(1)}})
    assert (checkpoint.configs, checkpoint.values, list(checkpoint.tensors)) == ({}, {}, ["a"])


def test_settings_have_names_that_can_be_shown(tmp_path: Path) -> None:
    _save(tmp_path / "a.safetensors", a=mx.ones(2))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"\n\n": 5}))
    assert read_checkpoint(tmp_path).configs == {"added_tokens.json": {"\n\n": 5}}
    for settings in ({"a\x1b[31m": 1}, {"rank_pattern": {"a\n": 1}}, {"a": [{"\0": 1}]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="adapter_config.json: .* is not a valid setting name"):
            read_checkpoint(tmp_path)
