"""Base models of many kinds and files are converted as mlx-lm converts them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.converters.base.files import weight_files
from mlx_mtp.converters.base.model import resolve_base
from mlx_mtp.converters.convert import BaseOptions, convert_model
from mlx_mtp.converters.pytorch import sandbox
from mlx_mtp.loading import load
from mlx_mtp.model.settings import read_settings
from tests.converters.base_models import (
    TRANSFORMERS,
    assert_same_weights,
    by_mlx_lm,
    by_transformers,
    convert,
    edit,
    logits,
    refusal,
    split,
    tensors,
    torch_files,
)
from tests.converters.test_sentencepiece import STYLES, train
from tests.helpers.tiny import KINDS, save_tiny_model

SANDBOX = pytest.mark.skipif(sandbox.why_unavailable() is not None, reason="no sandbox here")


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
    config = json.loads((theirs / "config.json").read_text())
    # mlx-lm overlooks what transformers 5 calls rope_parameters; PyTorch is the judge of that in
    # test_conversion_verify.py.
    (theirs / "config.json").write_text(json.dumps(read_settings(config).config))
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
def test_pytorch_files_and_a_relative_output(tmp_path, forked, monkeypatch):
    source = save_tiny_model(tmp_path / "in")
    torch_files(source, parts=1)
    monkeypatch.chdir(tmp_path)
    convert_model("in", Path("new/out"), base=BaseOptions(allow_pickle=True))
    assert load("./new/out")[0].config is None


@SANDBOX
@pytest.mark.parametrize(
    ("parts", "options"), [(1, {"dtype": "float16"}), (2, {}), (1, {"quantise": True})]
)
def test_pytorch_files_become_what_safetensors_become(tmp_path, forked, parts, options):
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
    assert "already quantised" in refusal(source, tmp_path / "again", quantise=True)


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


def test_which_files_are_the_weights(tmp_path):
    for name in ("adapter_model.safetensors", "training_args.bin", "optimizer.pt", "x.pt"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == [tmp_path / "x.pt"]
    (tmp_path / "y.bin").touch()
    with pytest.raises(ValueError, match=r"has several files that may be the model's: x.pt, y.bin"):
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

    def download(repo: str, *, allow_patterns: list[str], revision: str | None) -> str:
        assert revision is None
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("mlx_mtp.loading.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: names)
    assert resolve_base("user/name") == tmp_path
    assert resolve_base("user/name", trust_remote_code=True) == tmp_path
    (repo, patterns), (_, trusted) = asked
    assert repo == "user/name" and patterns[-1] == pattern
    assert "*.py" not in patterns and "*.py" in trusted
