"""Base models of many kinds and files are converted as mlx-lm converts them, or refused."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from fixtures_generate import byte_tokenizer
from mlx_lm import utils as lm_utils
from mlx_lm.convert import convert as mlx_lm_convert
from test_sentencepiece import STYLES, train
from tiny import BYTE_VOCAB, KINDS, save_tiny_model

from mlx_mtp.converters import sandbox
from mlx_mtp.converters.base_files import weight_files
from mlx_mtp.converters.base_model import BaseResult, convert_base, resolve_base
from mlx_mtp.converters.progress import ByteProgress
from mlx_mtp.converters.safetensors_file import check_safetensors
from mlx_mtp.converters.shards import write_shards
from mlx_mtp.loading import load

SANDBOX = pytest.mark.skipif(sandbox.why_unavailable() is not None, reason="no sandbox here")
IDS = [[5, 1, 77, 30, 2, 9, 9, 200]]
TRANSFORMERS = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
}


def convert(source: Path | str, tmp_path: Path, **options: Any) -> tuple[Path, BaseResult]:
    """Convert into ``tmp_path/work/out``; nothing else may stay in ``work``."""
    output = tmp_path / "work" / "out"
    output.mkdir(parents=True)
    result = convert_base(str(source), output, **options)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    return output, result


def refusal(source: Path | str, tmp_path: Path, **options: Any) -> str:
    """The one line with which a model is refused; nothing may be left behind."""
    output = tmp_path / "work" / "out"
    output.mkdir(parents=True)
    with pytest.raises(ValueError) as caught:
        convert_base(str(source), output, **options)
    assert "\n" not in str(caught.value) and str(caught.value)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert not any(output.iterdir())
    return str(caught.value)


def by_mlx_lm(source: Path, tmp_path: Path, **options: Any) -> Path:
    """mlx-lm's own conversion of the folder."""
    output = tmp_path / "mlx-lm"
    mlx_lm_convert(str(source), str(output), **options)
    return output


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a model folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        check_safetensors(path)
        found |= mx.load(str(path))  # type: ignore[arg-type]
    return found


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """The same tensors, types and bits."""
    mine, other = tensors(ours), tensors(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert value.dtype == other[name].dtype, name
        assert mx.array_equal(value, other[name]).item(), name


def logits(folder: Path) -> mx.array:
    """What mlx-lm computes with a model folder."""
    model: Any = lm_utils.load_model(folder)[0]
    return model(mx.array(IDS))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def split(folder: Path, *, parts: int = 3) -> None:
    """Distribute a folder's tensors over shards with an index."""
    found = sorted(tensors(folder).items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        shard = dict(found[number::parts])
        mx.save_safetensors(str(folder / name), shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def torch_files(folder: Path, *, parts: int) -> None:
    """Replace a folder's safetensors by PyTorch files."""
    found = tensors(folder)
    state = {}
    for name, value in found.items():
        wide: Any = value.astype(mx.float32)
        kind = {mx.float16: torch.float16, mx.bfloat16: torch.bfloat16}.get(value.dtype)
        state[name] = torch.tensor(memoryview(wide).tolist()).to(kind or torch.float32)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(parts):
        name = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        shard = dict(sorted(state.items())[number::parts])
        torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)


def by_transformers(folder: Path, kind: str, **options: Any) -> Path:
    """A model folder as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=BYTE_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **TRANSFORMERS[kind],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    byte_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_converted_as_by_mlx_lm(tmp_path, kind):
    source = save_tiny_model(tmp_path / "in", kind)
    output, result = convert(source, tmp_path)
    theirs = by_mlx_lm(source, tmp_path)
    assert_same_weights(output, theirs)
    assert mx.array_equal(logits(output), logits(theirs)).item()
    assert mx.array_equal(logits(output), logits(source)).item()
    config = json.loads((output / "config.json").read_text())
    assert config == json.loads((theirs / "config.json").read_text())
    model, tokenizer = load(str(output))
    assert model.config is None and tokenizer.encode("é") == list("é".encode())
    assert result.model_type == kind and result.compared_texts > 100
    assert result.num_bytes == sum(value.nbytes for value in tensors(output).values())


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_models_that_transformers_wrote(tmp_path, kind):
    source = by_transformers(tmp_path / "in", kind, max_shard_size="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    output, _ = convert(source, tmp_path)
    theirs = by_mlx_lm(source, tmp_path)
    assert_same_weights(output, theirs)
    assert mx.array_equal(logits(output), logits(theirs)).item()


@pytest.mark.parametrize("options", [{}, {"q_bits": 8, "q_group_size": 32}, {"q_bits": 3}])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_quantised_as_by_mlx_lm(tmp_path, kind, options):
    source = save_tiny_model(tmp_path / "in", kind, hidden_size=64)
    output, result = convert(source, tmp_path, quantise=True, **options)
    theirs = by_mlx_lm(source, tmp_path, quantize=True, **options)
    assert_same_weights(output, theirs)
    assert mx.array_equal(logits(output), logits(theirs)).item()
    config = json.loads((output / "config.json").read_text())
    assert config == json.loads((theirs / "config.json").read_text())
    quantisation = result.quantisation
    assert quantisation is not None
    assert (quantisation.bits, quantisation.group_size) == (
        options.get("q_bits", 4),
        options.get("q_group_size", 64),
    )
    assert config["quantization"]["bits"] == quantisation.bits
    assert "-bit in groups of" in result.summary
    load(str(output))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(tmp_path, dtype):
    source = save_tiny_model(tmp_path / "in")
    edit(source / "config.json", torch_dtype="float32")
    output, result = convert(source, tmp_path, dtype=dtype)
    assert_same_weights(output, by_mlx_lm(source, tmp_path, dtype=dtype))
    assert result.dtype == dtype
    assert {value.dtype for value in tensors(output).values()} == {getattr(mx, dtype)}
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, mx.float32),
        ({"torch_dtype": "bfloat16"}, mx.bfloat16),
        ({"dtype": "float16"}, mx.float16),
        ({"text_config": {"dtype": "bfloat16"}}, mx.bfloat16),
    ],
)
def test_the_default_dtype_is_the_models_own(tmp_path, changes, dtype):
    source = save_tiny_model(tmp_path / "in")
    edit(source / "config.json", **changes)
    output, _ = convert(source, tmp_path)
    assert {value.dtype for value in tensors(output).values()} == {dtype}


def test_shards_become_what_one_file_becomes(tmp_path):
    whole = save_tiny_model(tmp_path / "whole")
    sharded = save_tiny_model(tmp_path / "sharded")
    split(sharded)
    (tmp_path / "1").mkdir()
    first, _ = convert(whole, tmp_path / "1")
    (tmp_path / "2").mkdir()
    second, _ = convert(sharded, tmp_path / "2")
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@SANDBOX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "options"), [(1, {"dtype": "float16"}), (2, {}), (1, {"quantise": True})]
)
def test_pytorch_files_become_what_safetensors_become(tmp_path, parts, options):
    source = save_tiny_model(tmp_path / "in", hidden_size=64)
    (tmp_path / "1").mkdir()
    wanted, _ = convert(source, tmp_path / "1", **options)
    torch_files(source, parts=parts)
    (tmp_path / "2").mkdir()
    output, _ = convert(source, tmp_path / "2", allow_pickle=True, **options)
    assert_same_weights(output, wanted)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        path.name for path in wanted.iterdir()
    )


def test_pytorch_files_need_leave(tmp_path):
    source = save_tiny_model(tmp_path / "in")
    torch_files(source, parts=1)
    assert "pytorch_model.bin is a PyTorch pickle file: give --allow-pickle" in refusal(
        source, tmp_path
    )


@pytest.mark.parametrize("style", ["llama", "unigram bytes"])
def test_a_folder_with_a_sentencepiece_model_alone(tmp_path, style):
    model = train(tmp_path / "trained", STYLES[style])
    source = save_tiny_model(tmp_path / "in", vocab_size=520, eos_token_id=2)
    for path in source.glob("*token*"):
        path.unlink()
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "tokenizer.model").write_bytes(model.read_bytes())
    output, result = convert(source, tmp_path)
    _, tokenizer = load(str(output))
    assert result.compared_texts > 300 and tokenizer.encode("hello")[0] == 1
    assert tokenizer.has_chat_template
    assert not (output / "tokenizer.model").exists()


def test_a_quantised_model_is_copied_but_not_rounded_again(tmp_path):
    source = save_tiny_model(tmp_path / "in", quantised=True)
    output, result = convert(source, tmp_path)
    assert_same_weights(output, source)
    assert result.quantisation is None
    assert mx.array_equal(logits(output), logits(source)).item()
    (tmp_path / "again").mkdir()
    assert "quantised already" in refusal(source, tmp_path / "again", quantise=True)


def test_papers_are_copied_and_code_is_not(tmp_path):
    source = save_tiny_model(tmp_path / "in")
    (source / "generation_config.json").write_text('{"eos_token_id": [256, 3]}')
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "modeling_x.py", "notes.txt"):
        (source / name).write_text(name)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    output, result = convert(source, tmp_path)
    names = {path.name for path in output.iterdir()}
    assert {"LICENSE", "LICENSE.txt", "NOTICE", "generation_config.json"} <= names
    assert not names & {"modeling_x.py", "notes.txt", "README.md"}
    assert result.licence == "mit"
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == [256, 3]
    (tmp_path / "trusted").mkdir()
    trusted, _ = convert(source, tmp_path / "trusted", trust_remote_code=True)
    assert (trusted / "modeling_x.py").is_file()


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
        ({"model_type": None}, "does not say what model_type"),
        ({"model_type": 3}, "does not say what model_type"),
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
        (_fp8, "holds mlx.core.uint8 numbers"),
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
            "lacks a1, which the index says it has",
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

    monkeypatch.setattr("mlx_mtp.converters.shards._write_tensor", full)
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


def test_which_files_are_the_weights(tmp_path):
    for name in ("adapter_model.safetensors", "training_args.bin", "optimizer.pt", "x.pt"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == [tmp_path / "x.pt"]
    (tmp_path / "y.bin").touch()
    with pytest.raises(ValueError, match=r"does not say which files are the model's: x.pt, y.bin"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model*.safetensors"),
        (["pytorch_model.bin"], "pytorch_model*.bin"),
    ],
)
def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch, names, pattern):
    asked = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("mlx_mtp.converters.base_files.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: names)
    assert resolve_base("user/name") == tmp_path
    assert resolve_base("user/name", trust_remote_code=True) == tmp_path
    (repo, patterns), (_, trusted) = asked
    assert repo == "user/name" and patterns[-1] == pattern
    assert "*.py" not in patterns and "*.py" in trusted


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("mlx_mtp.converters.base_files.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    assert "neither a folder nor to be had from the hub" in refusal("user/name", tmp_path)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.bool_])
def test_shards_hold_what_was_written(tmp_path, dtype):
    values = {
        "a": mx.arange(24).reshape(2, 3, 4).astype(dtype),
        "transposed": mx.arange(12).reshape(3, 4).astype(dtype).T,
        "scalar": mx.array(1).astype(dtype),
        "empty": mx.zeros((0, 3)).astype(dtype),
        "wide": mx.broadcast_to(mx.array([[1], [0]]).astype(dtype), (2, 5)),
    }
    sizes: list[int] = []
    total = write_shards(tmp_path, dict(values), max_bytes=100, written=sizes.append)
    assert total == sum(sizes) == sum(value.nbytes for value in values.values())
    found = tensors(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(values) == set(found)
    for name, value in values.items():
        assert found[name].dtype == dtype and mx.array_equal(found[name], value).item()


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_progress_shows_bytes_rate_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("mlx_mtp.converters.progress.time.monotonic", lambda: clock[0])
    stream: Any = Terminal()
    with ByteProgress(1_000_000_000, stream=stream) as progress:
        progress.advance(100_000_000)
        assert stream.text == ""
        clock[0] += 2.5
        progress.advance(150_000_000)
        line = stream.text.rpartition("\x1b[K")[2]
        assert line.startswith("Converting [#")
        assert line.endswith("] 250 MB/1.00 GB 100 MB/s ETA 0:08") and len(line) < 80
        progress.expect(1_000_000_000)
        clock[0] += 5000
        progress.say("Writing")
        assert "Writing [" in stream.text and "250 MB/2.00 GB 50 KB/s ETA 9:43:" in stream.text
    assert stream.text.endswith("\r\x1b[K")


def test_progress_of_a_conversion_counts_all_bytes(tmp_path, monkeypatch):
    stream: Any = Terminal()
    monkeypatch.setattr("mlx_mtp.converters.progress._REDRAW_S", 0)
    with ByteProgress(stream=stream, delay_s=0) as progress:
        _, result = convert(save_tiny_model(tmp_path / "in"), tmp_path, progress=progress)
        size = f"{result.num_bytes / 1000:.0f} KB"
        assert f"{size}/{size}" in stream.text.split("\x1b[K")[-1]
    assert stream.text.endswith("\r\x1b[K")


PROGRESS = """
import sys, time
from mlx_mtp.converters.progress import ByteProgress
with ByteProgress(10_000_000, delay_s=0.2) as progress:
    for _ in range(10):
        time.sleep(0.1)
        progress.advance(1_000_000)
print("done")
"""


def test_progress_at_a_terminal_and_in_a_pipe():
    """On a pseudo-terminal a bar that is wiped away; elsewhere nothing."""
    command = [sys.executable, "-c", PROGRESS]
    quiet = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (quiet.stdout, quiet.stderr) == ("done\n", "")
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while chunk := _read(ours):
            shown.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    environment = {**os.environ, "COLUMNS": "60"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, timeout=60, env=environment
    )
    os.close(theirs)
    thread.join(timeout=10)
    os.close(ours)
    text = b"".join(shown).decode()
    assert result.stdout == b"done\n" and text.endswith("\r\x1b[K")
    lines = text.split("\r\x1b[K")
    assert any("#" in line and "MB/s ETA 0:0" in line for line in lines)
    assert all(len(line) < 60 for line in lines)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


MEMORY = """
import resource, sys
from pathlib import Path
from mlx_mtp.converters.base_model import convert_base
convert_base(sys.argv[1], Path(sys.argv[2]), quantise=sys.argv[3] == "q")
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def peak_bytes(source: Path, output: Path, mode: str) -> int:
    """Peak memory of a conversion in a process of its own."""
    output.mkdir(parents=True)
    command = [sys.executable, "-c", MEMORY, str(source), str(output), mode]
    # Through a shell: a child's peak counts what its parent held, and this process holds torch.
    text = subprocess.check_output(["sh", "-c", '"$@"; exit $?', "sh", *command], timeout=300)
    return int(text)


def write_large(folder: Path) -> int:
    """Give a folder a model of 240 MB in four shards; returns the bytes of the last one."""
    options: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048}
    save_tiny_model(folder, num_hidden_layers=1, **options)
    edit(folder / "config.json", num_hidden_layers=16)
    found = tensors(folder)
    layer = {name: value for name, value in found.items() if ".layers.0." in name}
    (folder / "model.safetensors").unlink()
    for number in range(4):
        values = {} if number else {k: v for k, v in found.items() if k not in layer}
        for index in range(4 * number, 4 * number + 4):
            values |= {name.replace(".0.", f".{index}."): value for name, value in layer.items()}
        mx.save_safetensors(str(folder / f"model-{number + 1:05d}-of-00004.safetensors"), values)
    return (folder / "model-00004-of-00004.safetensors").stat().st_size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Beside a model of nothing, a large one needs a tensor or two more, never a shard."""
    small = save_tiny_model(tmp_path / "small", hidden_size=64)
    shard_bytes = write_large(tmp_path / "large")
    assert shard_bytes > 50e6
    floor = peak_bytes(small, tmp_path / "floor" / "out", "plain")
    for mode in ("plain", "q"):
        peak = peak_bytes(tmp_path / "large", tmp_path / mode / "out", mode)
        assert peak < floor + shard_bytes / 2, mode


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch):
    from mlx_mtp.bench import convert as bench

    for name, value in (("_HIDDEN", 128), ("_VOCAB", 512), ("_LAYERS", 2), ("_SHARD_BYTES", 2e5)):
        monkeypatch.setattr(bench, name, value)
    source = tmp_path / "model"
    source.mkdir()
    bench.make_model(source, 0.001)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    runs = bench.measure(tmp_path, source, repeats=1)
    result = bench.summary(runs, largest_shard_bytes=10**6)
    assert result["passed"] == (result["ratio"] <= 1.5) and result["results"]["mlx_lm"]["median_s"]
    with pytest.raises(ValueError, match="failed: last line"):
        bench.run(["sh", "-c", "echo first line; echo last line; exit 3"])


def test_the_benchmark_compares_pairs():
    from mlx_mtp.bench.convert import Run, summary

    runs = {
        "mlx_lm": [Run(1.0, 5), Run(4.0, 5), Run(2.0, 9)],
        "mlx_mtp": [Run(2.0, 7), Run(4.0, 8), Run(2.2, 7)],
    }
    result = summary(runs, largest_shard_bytes=100)
    assert result["ratio"] == 1.1 and result["passed"]
    assert result["results"]["mlx_mtp"] == {"median_s": 2.2, "peak_bytes": 8}
    runs["mlx_mtp"][0] = Run(2.0, 3 * 10**9)
    assert not summary(runs, largest_shard_bytes=100)["passed"]
