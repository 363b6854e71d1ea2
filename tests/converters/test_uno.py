"""Uno's adapters as they are published: a bundle, an adapter in a subfolder of a hub repository."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peft
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.loading import load
from mlx_mtp.model.config import read_config
from tests.converters import torch_modules as parts
from tests.converters.conversions import run

REPO = "ifm-ai/uno-tiny"
CODE = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GENERATE = ("--prompt", "Once", "--max-tokens", "24", "--ignore-chat-template", "--verbose", "F")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as SDAR with code of its own, and an adapter of PEFT in ``adapter/``."""
    folder = tmp_path_factory.mktemp("hub") / "bundle"
    parts.save_model(parts.tiny_causal_lm("qwen3"), folder)
    settings: Any = {"r": 8, "lora_alpha": 128, "target_modules": LINEARS}
    live = parts.load_model(folder)
    model = peft.get_peft_model(live, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    parts.randomise(model, seed=3, only=("lora_",))
    model.save_pretrained(str(folder / "adapter"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "auto_map": CODE}
    config |= {"block_size": 5, "mask_token_id": 255, "fuse_cross_entropy": True}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def hub(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published files on a hub, of which the requested ones are downloaded."""
    published, copy = shutil.copytree(bundle, tmp_path / "published"), tmp_path / "snapshot"

    def download(repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert repo == REPO and options in ({}, {"revision": None})
        shutil.rmtree(copy, ignore_errors=True)
        for path in published.rglob("*"):
            name = str(path.relative_to(published))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy / name)
        return str(copy)

    names = [str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()]
    monkeypatch.setattr("mlx_mtp.loading.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: names)
    return published


def check_answers(*where: str) -> None:
    """The text with drafts is the text without."""
    plain = run("generate", *where, *GENERATE, "--no-mtp")
    for layout in ("auto", "quadratic"):
        assert run("generate", *where, *GENERATE, "--layout", layout) == plain


def test_a_bundle_is_converted_by_one_command(bundle: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    paths = ("--hf-path", str(bundle), "--mtp-path", str(bundle), "--mlx-path", out)
    printed = run("convert", *paths, "--verify")
    assert "peft-lora, k 4, rank 8, no sampler" in printed
    assert "num_draft_tokens: 4, one less than block_size 5" in printed
    assert "mask rows: random ids from 1 to 254, below the mask token" in printed
    config = read_config(tmp_path / "out" / "adapter")
    assert config.noise_ids == (1, 255) and config.scale == 16 and config.sampler is None
    check_answers("--model", out)
    assert load(out)[0].num_draft_tokens == 4


def test_a_bundle_on_the_hub(hub: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run("convert", "--hf-path", REPO, "--mtp-path", f"{REPO}/adapter", "--mlx-path", out)
    assert read_config(tmp_path / "out" / "adapter").noise_ids == (1, 255)
    check_answers("--model", out)


def test_an_adapter_alone_in_a_subfolder(hub: Path, tmp_path: Path) -> None:
    """For another copy of the base model; the converted adapter may be in a subfolder too."""
    model, adapter = str(tmp_path / "model"), tmp_path / "adapter"
    run("convert", "--hf-path", REPO, "--mlx-path", model, "-q", "--q-group-size", "32")
    paths = ("--mtp-path", f"{REPO}/adapter", "--base-model", model, "--mlx-path", str(adapter))
    printed = run("convert", *paths)
    assert [path.name for path in (tmp_path / "snapshot").iterdir()] == ["adapter"]
    assert "random ids from 1 to 254" in printed  # config.json of the converted model has the id
    shutil.rmtree(hub / "adapter")
    shutil.copytree(adapter, hub / "adapter")
    check_answers("--model", model, "--adapter-path", f"{REPO}/adapter")


def test_what_is_not_converted_yet_says_how(hub: Path, bundle: Path, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    run("convert", "--hf-path", str(bundle), "--mlx-path", model)
    result = CliRunner().invoke(
        cli, ["generate", "--model", model, "--adapter-path", f"{REPO}/adapter", "--prompt", "a"]
    )
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"convert it with mlx-mtp convert --mtp-path {REPO}/adapter --base-model" in (
        result.stderr
    )
    result = CliRunner().invoke(
        cli, ["generate", "--model", model, "--adapter-path", f"{REPO}/other", "--prompt", "a"]
    )
    assert result.exit_code == 2
    assert result.stderr == f"Error: {REPO} on the Hugging Face Hub has no folder other\n"


def test_without_a_block_size_k_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    config = json.loads((copy / "config.json").read_text())
    del config["block_size"]
    (copy / "config.json").write_text(json.dumps(config))
    paths = ["--hf-path", str(copy), "--mtp-path", str(copy), "--mlx-path", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, ["convert", *paths])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "add --checkpoint-option num_draft_tokens=7" in result.stderr
    run("convert", *paths, "--checkpoint-option", "num_draft_tokens=7")
    assert read_config(tmp_path / "out" / "adapter").num_draft_tokens == 7
