"""The flow of a conversion: whole folders or none, and one line about what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.converters.convert import AdapterOptions, BaseOptions, convert_adapter, convert_model
from mlx_mtp.converters.export import export_adapter
from mlx_mtp.loading import load, read_adapter
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, read_config
from mlx_mtp.storage.default_model import DEFAULT_MODEL_NAME
from tests.helpers.tiny import (
    BYTE_VOCAB,
    random_adapter,
    save_adapter,
    save_tiny_model,
    save_tiny_pair,
    tiny_base,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model folder, an adapter for it, and the adapter as a PEFT checkpoint."""
    root = tmp_path_factory.mktemp("sources")
    model, adapter = save_tiny_pair(root)
    export_adapter(str(adapter), root / "checkpoint", base_model=str(model))
    return model, adapter, root / "checkpoint"


def run(*args: object) -> str:
    """Run the command; returns stdout."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def failure(*args: object) -> str:
    """The one line with which the command refuses."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def same_adapter(first: Path, second: Path) -> bool:
    (_, left), (_, right) = read_adapter(first), read_adapter(second)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and mx.array_equal(left[name], right[name]).item()
        for name in left
    )


def named(checkpoint: Path, copy: Path, base: str | None) -> Path:
    """A copy of a checkpoint that names another base model."""
    shutil.copytree(checkpoint, copy)
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    return copy


class TestBundle:
    def test_one_command_makes_a_folder_that_generates(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, adapter, checkpoint = sources
        out = tmp_path / "out"
        text = run("convert", "--hf-path", model, "--mtp-path", checkpoint, "--mlx-path", out)
        assert f"wrote {out}: llama" in text and f"wrote {out / 'adapter'}: peft-mtp, k 4" in text
        assert same_adapter(adapter, out / "adapter")
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
            path.name for path in out.iterdir()
        }
        loaded = load(str(out))[0]
        assert loaded.config is not None and loaded.config.num_draft_tokens == 4
        answer = json.loads(run("generate", "--model", out, "-p", "hello", "-m", 12, "--json"))
        plain = run("generate", "--model", out, "-p", "hello", "-m", 12, "--json", "--no-mtp")
        assert answer["tokens"] == json.loads(plain)["tokens"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_quantised_models_keep_their_adapter(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, adapter, checkpoint = sources
        base = BaseOptions(quantise=True, q_bits=8, q_group_size=32)
        result = convert_model(str(model), tmp_path / "out", checkpoint=checkpoint, base=base)
        assert result.base is not None and result.base.quantisation is not None
        assert same_adapter(adapter, tmp_path / "out" / "adapter")
        assert load(str(tmp_path / "out"))[0].config == result.adapter

    def test_the_model_card_says_both(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, _, checkpoint = sources
        convert_model(str(model), tmp_path / "out", checkpoint=checkpoint)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "library_name: mlx" in card and "multi-token-prediction" in card
        assert "4 mask tokens, gated LoRA of rank 4" in card
        assert "adapter" in (tmp_path / "out" / "adapter" / "README.md").read_text()

    def test_a_check_that_fails_leaves_nothing(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        def refuse(folder: Path) -> None:
            assert load(str(folder))[0].config is not None
            raise ValueError("no")

        with pytest.raises(ValueError, match="^no$"):
            convert_model(str(sources[0]), tmp_path / "out", checkpoint=sources[2], check=refuse)
        assert list(tmp_path.iterdir()) == []


class TestAdapterAlone:
    def test_there_and_back_is_the_identity(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, adapter, checkpoint = sources
        out = tmp_path / "out"
        convert_adapter(checkpoint, out, base_model=model)
        assert (out / CONFIG_FILE).read_bytes() == json_of(adapter)
        assert same_adapter(out, adapter)
        again = tmp_path / "again"
        run("export", "--adapter-path", out, "--peft-path", again, "--model", model)
        run("convert", "--mtp-path", again, "--base-model", model, "--mlx-path", tmp_path / "third")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            assert (out / name).read_bytes() == (tmp_path / "third" / name).read_bytes()
        assert (again / "adapter_config.json").read_bytes() == (
            checkpoint / "adapter_config.json"
        ).read_bytes()

    def test_the_default_model_is_the_embedded_one(
        self,
        sources: tuple[Path, Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model, _, checkpoint = sources
        copy = named(checkpoint, tmp_path / "checkpoint", DEFAULT_MODEL_NAME)
        monkeypatch.setattr("mlx_mtp.converters.base.facts.default_model_path", lambda: model)
        result = convert_adapter(copy, tmp_path / "out")
        assert result.adapter is not None and result.adapter.base_model == DEFAULT_MODEL_NAME

    def test_the_licence_is_carried_over_or_given(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, _, checkpoint = sources
        copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
        (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        convert_adapter(copy, tmp_path / "a", base_model=model)
        assert "license: apache-2.0\n" in (tmp_path / "a" / "README.md").read_text()
        given = AdapterOptions(licence="mit")
        convert_adapter(copy, tmp_path / "b", base_model=model, adapter=given)
        assert "license: mit\n" in (tmp_path / "b" / "README.md").read_text()

    def test_published_bundles_keep_it_in_a_folder(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, adapter, checkpoint = sources
        bundle = save_tiny_model(tmp_path / "bundle")
        shutil.copytree(checkpoint, bundle / "adapter")
        convert_adapter(bundle, tmp_path / "out", base_model=model)
        assert same_adapter(tmp_path / "out", adapter)


def json_of(adapter: Path) -> bytes:
    return (json.dumps(read_config(adapter).to_dict(), indent=2) + "\n").encode()


class TestExport:
    def test_what_peft_cannot_say_is_refused(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model = sources[0]
        config, weights = random_adapter(tiny_base(vocab_size=BYTE_VOCAB))
        for name in ("norm_1.bias", "norm_2.bias"):
            weights.pop(f"sampler_head.{name}")
        values: Any = config.to_dict() | {"sampler_norm": "rms"}
        adapter = save_adapter(tmp_path / "adapter", type(config).from_dict(values), weights)
        line = failure(
            "export", "--adapter-path", adapter, "--peft-path", tmp_path / "out", "--model", model
        )
        assert str(adapter) in line and "rms" in line.lower()
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    def test_a_quantised_adapter_is_exported_as_the_weights_that_it_loads(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, adapter, _ = sources
        small, again = tmp_path / "small", tmp_path / "again"
        words = ["--adapter-bits", "4", "--adapter-group-size", "32"]
        run("compress", adapter, "--adapter-path", small, *words)
        run("export", "--adapter-path", small, "--peft-path", tmp_path / "peft", "--model", model)
        convert_adapter(tmp_path / "peft", again, base_model=model)
        (_, left), (config, right) = read_adapter(small), read_adapter(again)
        assert config.bits == 0 and left.keys() == right.keys()
        for name, value in left.items():
            assert mx.array_equal(value.astype(mx.float32), right[name].astype(mx.float32))

    def test_mask_tokens_stand_behind_the_tokenizers_own(
        self, sources: tuple[Path, Path, Path]
    ) -> None:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(sources[2])
        settings = json.loads((sources[2] / "adapter_config.json").read_text())
        ids = tokenizer.convert_tokens_to_ids([f"<mask_{index}>" for index in (1, 2, 3, 4)])
        assert ids == settings["alora_invocation_tokens"] == settings["trainable_token_indices"]
        assert tokenizer.encode("a<mask_2>b", add_special_tokens=False)[1] == ids[1]


class TestOutput:
    def test_refuses_an_existing_folder(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, _, checkpoint = sources
        (tmp_path / "out").mkdir()
        for args in (["--hf-path", model], ["--mtp-path", checkpoint, "--base-model", model]):
            line = failure("convert", *args, "--mlx-path", tmp_path / "out")
            assert "out already exists (--force replaces it)" in line

    def test_force_replaces_what_was_written_here(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, _, checkpoint = sources
        out = tmp_path / "out"
        convert_adapter(checkpoint, out, base_model=model)
        (out / "old").write_text("")
        convert_model(str(model), out, force=True)
        assert not (out / "old").exists() and (out / "config.json").exists()
        convert_adapter(checkpoint, out, base_model=model, force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_force_replaces_no_input(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        model, adapter, checkpoint = sources
        root = model.parent
        for args, out in (
            (["convert", "--hf-path", model, "--mlx-path"], model),
            (
                ["convert", "--mtp-path", checkpoint, "--base-model", model, "--mlx-path"],
                checkpoint,
            ),
            (["convert", "--mtp-path", checkpoint, "--base-model", model, "--mlx-path"], model),
            (["convert", "--hf-path", model, "--mtp-path", checkpoint, "--mlx-path"], root),
            (["export", "--adapter-path", adapter, "--model", model, "--peft-path"], adapter),
        ):
            line = failure(*args, out, "--force")
            assert f"{out} would replace" in line and "choose another folder" in line
        link = tmp_path / "link"
        link.symlink_to(model)
        assert "would replace" in failure("convert", "--hf-path", model, "--mlx-path", link)

    @pytest.mark.parametrize("kind", ["folder", "file", "link"])
    def test_force_replaces_nothing_else(
        self, sources: tuple[Path, Path, Path], tmp_path: Path, kind: str
    ) -> None:
        out, precious = tmp_path / "out", tmp_path / "precious"
        precious.mkdir()
        (precious / "thesis.txt").write_text("")
        if kind == "folder":
            precious.rename(out)
        elif kind == "file":
            out.write_text("")
        else:
            out.symlink_to(precious)
        message = "is a link" if kind == "link" else "neither a model nor an adapter folder"
        with pytest.raises(ValueError, match=message):
            convert_model(str(sources[0]), out, force=True)
        assert out.exists()

    def test_a_failed_write_leaves_nothing(
        self,
        sources: tuple[Path, Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(path: str, *args: Any) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 9 bytes to file.")

        monkeypatch.setattr(mx, "save_safetensors", full)
        with pytest.raises(ValueError, match="cannot write .*out: .*Unable to write"):
            convert_adapter(sources[2], tmp_path / "out", base_model=sources[0])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "content", [{"config.json": '{"port": 80}'}, {"config.json": "[]"}, {"index.html": ""}]
    )
    def test_force_knows_a_model_by_its_content(
        self, sources: tuple[Path, Path, Path], tmp_path: Path, content: dict[str, str]
    ) -> None:
        for name, text in content.items():
            (tmp_path / name).write_text(text)
        line = failure("convert", "--hf-path", sources[0], "--mlx-path", tmp_path, "--force")
        assert "neither a model nor an adapter folder" in line
        copy = tmp_path / "model"
        convert_model(str(sources[0]), copy)
        (copy / ".git").mkdir()
        line = failure("convert", "--hf-path", sources[0], "--mlx-path", copy, "--force")
        assert "neither a model nor an adapter folder" in line

    def test_the_working_directory_is_not_replaced(
        self, sources: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert_model(str(sources[0]), tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")
        for out in (".", "../here"):
            line = failure("convert", "--hf-path", sources[0], "--mlx-path", out, "--force")
            assert "would replace the working directory" in line

    @pytest.mark.parametrize("name", ["out", "sp ace [1] *", "new/[a-b]?/out"])
    def test_paths_may_be_relative_and_hold_anything(
        self,
        sources: tuple[Path, Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        model, _, checkpoint = sources
        monkeypatch.chdir(tmp_path)
        run("convert", "--hf-path", model, "--mtp-path", checkpoint, "--mlx-path", name)
        assert load("./" + name)[0].config is not None
        run("convert", "--hf-path", name, "--mlx-path", "again", "-q", "--q-group-size", 32)
        assert "refused" not in run("inspect", name)


BAD_FLAGS = [
    ([], "--hf-path or --gguf, --mtp-path, or both are required"),
    (["--mtp-path", "c", "-q"], "--quantize needs --hf-path"),
    (["--mtp-path", "c", "--dtype", "float16"], "--dtype needs --hf-path"),
    (["--mtp-path", "c", "--verify"], "--verify needs --hf-path"),
    (["--hf-path", "m", "--q-bits", "4"], "--q-bits needs -q"),
    (["--hf-path", "m", "--checkpoint-layout", "x"], "--checkpoint-layout needs --mtp-path"),
    (["--hf-path", "m", "--licence", "mit"], "--license needs --mtp-path"),
    (["--hf-path", "m", "--base-model", "b"], "--base-model cannot be combined with --hf-path"),
    (["--mtp-path", ".", "--checkpoint-option", "alpha"], "--checkpoint-option must be KEY=VALUE"),
    (["--mtp-path", "/no/such/folder"], "checkpoint /no/such/folder does not exist"),
    (["--hf-path", "/no/such/folder"], "/no/such/folder"),
    (["--hf-path", "m", "--dtype", "int8"], "--dtype"),
    (["--hf-path", ""], "--hf-path is empty"),
    (
        ["--hf-path", "m", "--upload-repo", "bad name!!"],
        "--upload-repo 'bad name!!' is not a repository name",
    ),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[text for _, text in BAD_FLAGS])
def test_flags_that_do_not_fit_are_named(flags: list[str], message: str, tmp_path: Path) -> None:
    assert message in failure("convert", *flags, "--mlx-path", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class TestNames:
    def test_paths_of_this_machine_are_never_written(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        copy = named(sources[2], tmp_path / "checkpoint", "/home/alice/secret/base")
        out = tmp_path / "out"
        text = run("convert", "--hf-path", sources[0], "--mtp-path", copy, "--mlx-path", out)
        assert "the checkpoint names base /home/alice/secret/base, model was used" in text
        assert read_config(out / "adapter").base_model == "model"

    def test_a_hub_id_that_the_checkpoint_names_is_kept(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        copy = named(sources[2], tmp_path / "checkpoint", "someone/tiny")
        out = tmp_path / "out"
        run("convert", "--hf-path", sources[0], "--mtp-path", copy, "--mlx-path", out)
        assert read_config(out / "adapter").base_model == "someone/tiny"
        assert "base_model: someone/tiny" in (out / "README.md").read_text()

    def test_a_checkpoint_is_no_adapter(self, sources: tuple[Path, Path, Path]) -> None:
        model, _, checkpoint = sources
        line = failure("generate", "--model", model, "--adapter-path", checkpoint, "-p", "x")
        assert "is an unconverted peft-mtp checkpoint, not an adapter: convert it with" in line


class TestBaseModel:
    def test_a_checkpoint_that_names_none(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        copy = named(sources[2], tmp_path / "checkpoint", None)
        line = failure("convert", "--mtp-path", copy, "--mlx-path", tmp_path / "out")
        assert "does not name its base model: specify it with --base-model" in line

    def test_another_model_is_refused(
        self, sources: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        other = save_tiny_model(tmp_path / "other", hidden_size=64)
        with pytest.raises(ValueError, match="checkpoint: .*64"):
            convert_adapter(sources[2], tmp_path / "out", base_model=other)

    def test_a_foreign_folder(self, sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot load the base model in"):
            convert_adapter(sources[2], tmp_path / "out", base_model=sources[2])


def test_mlx_lm_reads_a_converted_model(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    convert_model(str(sources[0]), tmp_path / "out", checkpoint=sources[2])
    ours, theirs = (mlx_lm.load(str(path))[0] for path in (tmp_path / "out", sources[0]))
    ids = mx.array([[72, 105]])
    assert mx.array_equal(ours(ids), theirs(ids))
