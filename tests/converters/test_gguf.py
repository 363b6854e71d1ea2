"""`convert --gguf`, `--model FILE.gguf` and `inspect FILE.gguf`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from gguf.constants import GGMLQuantizationType as Type

from mlx_mtp.cli.main import cli
from mlx_mtp.loading import load, locate
from mlx_mtp.storage.cards import read_licence
from mlx_mtp.storage.gguf import cached
from mlx_mtp.storage.gguf.cached import gguf_model_path
from tests.helpers.tiny_gguf import write_tiny_gguf

KINDS = (Type.Q4_K, Type.Q8_0, Type.Q6_K, Type.F16)
GENERAL = {
    "general.license": "apache-2.0",
    "general.name": "Tiny Model",
    "general.source.repo_url": "https://huggingface.co/some/tiny",
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    return write_tiny_gguf(tmp_path / "in" / "tiny.gguf", KINDS, general=GENERAL)


def run(*arguments: object) -> tuple[int, str]:
    """Run a command; return its exit code and all its output."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def weights(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


class TestConvert:
    def test_quantised_weights_are_kept(self, tiny: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        code, text = run("convert", "--gguf", tiny, "--mlx-path", out)
        assert code == 0, text
        assert "1 tensor F16: kept exactly" in text and "3 tensors F32: as float16" in text
        assert "Q8_0: kept exactly (8-bit, groups of 32)" in text
        assert "Q4_K: kept; scales rounded to float16 (4-bit, groups of 32)" in text
        assert "Q6_K: rounded to 8 bits" in text
        settings = config(out)["quantization"]
        assert settings["bits"] in (4, 8) and settings["group_size"] == 32
        card = (out / "README.md").read_text()
        assert "base_model: some/tiny" in card and "Q6_K: rounded to 8 bits" in card
        assert read_licence(out) == "apache-2.0"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        tokenizer = load(str(out), mtp=False)[1]
        assert tokenizer.decode(tokenizer.encode("Hi AB")) == "Hi AB"
        again = gguf_model_path(tiny)
        assert {k: v.tolist() for k, v in weights(again).items()} == {
            k: v.tolist() for k, v in weights(out).items()
        }

    def test_quantised_anew(self, tiny: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        options = ("-q", "--q-bits", 3, "--q-group-size", 64)
        code, text = run("convert", "--gguf", tiny, "--mlx-path", out, *options)
        assert code == 0, text
        assert "3-bit in groups of 64" in text and "Q4_K: read as float16" in text
        assert config(out)["quantization"]["bits"] == 3
        name = "model.layers.0.mlp.down_proj.scales"
        assert weights(out)[name].dtype == mx.float16

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_unpacked(self, tiny: Path, tmp_path: Path, dtype: str) -> None:
        code, text = run(
            "convert", "--hf-path", tiny, "--dtype", dtype, "--mlx-path", tmp_path / "o"
        )
        assert code == 0, text
        assert {value.dtype for value in weights(tmp_path / "o").values()} == {getattr(mx, dtype)}
        assert "quantization" not in config(tmp_path / "o")

    def test_shards(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mlx_mtp.storage.gguf.convert.MAX_SHARD_BYTES", 100_000)
        folder = gguf_model_path(tiny)
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        load(str(folder), mtp=False)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--gguf", "{tiny}", "--hf-path", "x"], "--gguf cannot be combined with --hf-path"),
            (["--gguf", "{tiny}", "--verify"], "--verify needs a PyTorch model"),
            (["--gguf", "{tiny}", "--q-bits", "4"], "--q-bits needs -q"),
            (["--gguf", "{tiny}", "--base-model", "x"], "--base-model cannot be combined"),
            (["--gguf", "none.gguf"], "--gguf none.gguf does not exist"),
            (["--gguf", __file__], "is not a GGUF file"),
            (["--gguf", "{tiny}", "--mlx-path", "{folder}"], "which is read"),
        ],
    )
    def test_refusals(self, tiny: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
        arguments = [part.format(tiny=tiny, folder=tiny.parent) for part in arguments]
        output = [] if "--mlx-path" in arguments else ["--mlx-path", str(tmp_path / "out")]
        code, text = run("convert", *arguments, *output)
        assert code == 2 and message in text
        assert not (tmp_path / "out").exists()

    def test_a_refused_model_leaves_nothing(self, tiny: Path, tmp_path: Path) -> None:
        bad = write_tiny_gguf(tiny.with_name("bad.gguf"), keys={"logit_scale": 3.0})
        code, text = run("convert", "--gguf", bad, "--mlx-path", tmp_path / "work" / "out")
        assert code == 2 and f"{bad}: llama.logit_scale is 3.0" in text
        assert list((tmp_path / "work").iterdir()) == []

    def test_values_beyond_float16_are_named(self, tmp_path: Path) -> None:
        path = write_tiny_gguf(tmp_path / "big.gguf", (Type.F16,), scale_of_norms=1e5)
        code, text = run("convert", "--gguf", path, "--mlx-path", tmp_path / "out")
        assert code == 2 and "values beyond float16" in text and "norm.weight" in text
        options = ("--dtype", "bfloat16")
        assert run("convert", "--gguf", path, "--mlx-path", tmp_path / "out", *options)[0] == 0


class TestInPlaceOfAModel:
    def test_converted_once(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines: list[str] = []
        folder, adapter = locate(str(tiny), None, progress=lines.append)
        assert adapter is None and folder.parent == cached.cache_dir() / "gguf"
        assert lines[0].startswith("Converting tiny.gguf for MLX (once, in ")
        assert (folder / "README.md").is_file()
        monkeypatch.setattr("mlx_mtp.storage.gguf.convert.write_model", lambda *_: pytest.fail())
        assert locate(str(tiny), None, progress=lambda line: pytest.fail(line))[0] == folder

    def test_a_changed_file_is_converted_anew(self, tiny: Path) -> None:
        folder = gguf_model_path(tiny)
        status = tiny.stat()
        os.utime(tiny, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert gguf_model_path(tiny) != folder

    def test_a_damaged_conversion_is_repaired(self, tiny: Path) -> None:
        folder = gguf_model_path(tiny)
        (folder / "config.json").unlink()
        assert gguf_model_path(tiny) == folder and (folder / "config.json").is_file()

    def test_generate(self, tiny: Path) -> None:
        code, text = run("generate", "--model", tiny, "--prompt", "AB", "--max-tokens", 3)
        assert code == 0 and "Generation: 3 tokens" in text

    def test_a_folder_of_gguf_files(self, tiny: Path) -> None:
        code, text = run("generate", "--model", tiny.parent, "--prompt", "a")
        assert code == 2 and f"use --model {tiny}" in text

    def test_no_adapter(self, tiny: Path) -> None:
        code, text = run("generate", "--adapter-path", tiny, "--prompt", "a")
        assert code == 2 and "is a GGUF file, not an adapter" in text

    def test_what_mlx_lm_cannot_build_is_not_kept(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(folder: Path) -> None:
            raise KeyError("no such thing")

        monkeypatch.setattr("mlx_mtp.loading.open_base", fail)
        with pytest.raises(ValueError, match=r"tiny.gguf cannot be used: 'no such thing'"):
            locate(str(tiny), None)
        assert not any((cached.cache_dir() / "gguf").glob("tiny*"))


class TestInspect:
    def test_a_model(self, tiny: Path) -> None:
        code, text = run("inspect", tiny)
        assert code == 0 and "refused" not in text and "as a model" not in text
        for part in (
            "GGUF",
            "llama",
            "some/tiny",
            "apache-2.0",
            "gpt2, gpt-2",
            "Q6_K: rounded",
            "yes, ",
        ):
            assert part in text
        facts = json.loads(run("inspect", tiny, "--json")[1])["facts"]
        assert (facts["layers"], facts["hidden_size"], facts["vocabulary"]) == (1, 256, 300)

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            ({"keys": {"logit_scale": 2.0}}, "model", "llama.logit_scale is 2.0"),
            ({"arch": "rwkv7"}, "model", "architecture 'rwkv7' is not supported"),
            ({"general": {"general.type": "adapter"}}, "unknown", "is a LoRA adapter"),
        ],
    )
    def test_what_is_refused(
        self, tiny: Path, change: dict[str, Any], kind: str, message: str
    ) -> None:
        path = write_tiny_gguf(tiny.with_name("other.gguf"), **change)
        code, text = run("inspect", path)
        assert code == 0 and f"other.gguf: {kind}" in text
        assert f"refused: {path}" in text and message in text

    def test_a_broken_file(self, tiny: Path) -> None:
        tiny.write_bytes(tiny.read_bytes()[:5000])
        code, text = run("inspect", tiny)
        assert code == 0 and "tiny.gguf: unknown" in text and "is not a sound GGUF file" in text
