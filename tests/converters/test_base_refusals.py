"""Base models that cannot be converted are refused in one line, and leave nothing behind."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.converters.base.model import convert_base
from tests.converters.base_models import convert, edit, refusal, split, tensors, torch_files
from tests.helpers.tiny import save_tiny_model


def test_pytorch_files_need_leave(tmp_path):
    source = save_tiny_model(tmp_path / "in")
    torch_files(source, parts=1)
    assert "pytorch_model.bin is a PyTorch pickle file: use --allow-pickle" in refusal(
        source, tmp_path
    )


def test_code_in_the_folder_runs_only_with_leave(tmp_path):
    source = save_tiny_model(tmp_path / "in")
    proof = tmp_path / "ran"
    (source / "own.py").write_text(
        f"open({str(proof)!r}, 'w')\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    edit(source / "config.json", model_file="own.py")
    line = refusal(source, tmp_path)
    assert "config.json has model_file" in line and "--trust-remote-code" in line
    assert not proof.exists()
    (tmp_path / "trusted").mkdir()
    output, _ = convert(source, tmp_path / "trusted", trust_remote_code=True)
    assert proof.exists() and (output / "own.py").is_file()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_auto_map_is_refused(tmp_path, name):
    source = save_tiny_model(tmp_path / "in")
    edit(source / name, auto_map={"AutoTokenizer": ["x.X", None], "AutoConfig": "x.C"})
    line = refusal(source, tmp_path)
    assert f"{name} has auto_map" in line and "--trust-remote-code" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": True, "q_bits": 7}, "q_bits must be one of 1, 2, 3, 4, 5, 6, 8, got 7"),
        ({"quantise": True, "q_bits": 0}, "q_bits must be one of"),
        ({"quantise": True, "q_group_size": 48}, "q_group_size must be one of 32, 64, 128, got 48"),
        ({"q_bits": 4}, "need quantise"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, got int8"),
        ({"quantise": True}, "no layer whose width 64 divides: choose another q_group_size"),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, message):
    source = save_tiny_model(tmp_path / "in", intermediate_size=96)
    assert message in refusal(source, tmp_path, **options)


def test_missing_models_are_one_line(tmp_path):
    assert "does not exist" in refusal(str(tmp_path / "none"), tmp_path / "1")
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in refusal(str(tmp_path / "file"), tmp_path / "2")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(str(tmp_path / "empty"), tmp_path / "3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_type"}, "mlx-lm does not support model_type 'no_such_type'"),
        ({"model_type": "base"}, "does not support model_type 'base'"),
        ({"model_type": "../llama"}, "does not support model_type '../llama'"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": 3}, "has no model_type"),
        ({"hidden_size": None}, "cannot load the model"),
        ({"hidden_size": "wide"}, "cannot load the"),
        ({"dtype": "auto"}, "cannot load the"),
        ({"hidden_size": 40}, "cannot load the model"),
        ({"num_hidden_layers": 3}, "cannot load the model"),
        ({"num_hidden_layers": 10**9}, "claims 1000000000 layers, but there are 20 tensors"),
        ({"quantization": {"bits": 4}}, "cannot load the model"),
    ],
)
def test_bad_configurations_are_one_line(tmp_path, changes, message):
    source = save_tiny_model(tmp_path / "in")
    edit(source / "config.json", **changes)
    line = refusal(source, tmp_path)
    assert message in line and str(source) in line


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _fp8(source: Path) -> None:
    """Claim that byte tensors are 8-bit floats, which mlx-lm would take for the weights."""
    values = tensors(source)
    values = {name: mx.zeros(value.shape, mx.uint8) for name, value in values.items()}
    path = source / "model.safetensors"
    mx.save_safetensors(str(path), values)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode().replace('"U8"', '"F8_E4M3"').encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda s: (s / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda s: (s / "generation_config.json").write_text("{"), "generation_config.json is not"),
        (lambda s: (s / "model.safetensors").unlink(), "has no weights"),
        (lambda s: _truncate(s / "model.safetensors", 3000), "model.safetensors is not a sound"),
        (lambda s: _truncate(s / "model.safetensors", 4), "model.safetensors is not a sound"),
        (lambda s: (s / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
        (lambda s: (s / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not"),
        (lambda s: [path.unlink() for path in s.glob("token*")], "cannot load the tokenizer"),
        (_fp8, "has type mlx.core.uint8"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, damage, message):
    source = save_tiny_model(tmp_path / "in")
    damage(source)
    line = refusal(source, tmp_path)
    assert message in line and str(source) in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "model-00002-of-00003.safetensors").unlink(), "is missing"),
        (
            lambda s: (s / "model-00002-of-00003.safetensors").write_bytes(
                (s / "model-00001-of-00003.safetensors").read_bytes()
            ),
            "is both in model-00001-of-00003.safetensors and in model-00002",
        ),
        (
            lambda s: edit(
                s / "model.safetensors.index.json",
                weight_map={"a": "../in/model-00001-of-00003.safetensors"},
            ),
            "is not a plain file name",
        ),
        (
            lambda s: edit(
                s / "model.safetensors.index.json",
                weight_map={f"a{i}": f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)},
            ),
            "has no a1, which the index lists",
        ),
        (
            lambda s: edit(
                s / "model.safetensors.index.json",
                weight_map={"a": "model-00001-of-00003.safetensors"},
            ),
            "model-00002-of-00003.safetensors is missing",
        ),
    ],
)
def test_damaged_shards_are_one_line(tmp_path, damage, message):
    source = save_tiny_model(tmp_path / "in")
    split(source)
    damage(source)
    assert message in refusal(source, tmp_path)


def test_missing_tensors_are_one_line(tmp_path):
    source = save_tiny_model(tmp_path / "in")
    values = tensors(source)
    values.pop("model.norm.weight")
    mx.save_safetensors(str(source / "model.safetensors"), values)
    line = refusal(source, tmp_path)
    assert "cannot load the model" in line and "model.norm.weight" in line


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_mtp.storage.shards._write_item", full)
    source = save_tiny_model(tmp_path / "in")
    output = tmp_path / "work" / "out"
    output.mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"):
        convert_base(str(source), output)
    assert not any(output.iterdir()) and len(list(output.parent.iterdir())) == 1


def test_config_json_comes_last(tmp_path, monkeypatch):
    seen = []

    def save(config: Any, config_path: Path, **_: Any) -> None:
        seen.extend(path.name for path in config_path.parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_lm.utils.save_config", save)
    source = save_tiny_model(tmp_path / "in")
    output = tmp_path / "work" / "out"
    output.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        convert_base(str(source), output)
    assert {"model.safetensors", "tokenizer.json"} <= set(seen) and "config.json" not in seen
    assert not any(output.iterdir())


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("mlx_mtp.loading.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    assert "locally or on the Hugging Face Hub" in refusal("user/name", tmp_path)
