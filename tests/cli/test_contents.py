"""Folders and files that a command cannot use: every command says what ``inspect`` says."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.converters.export import export_adapter
from mlx_mtp.storage.contents import look
from tests.converters import layout_samples as samples
from tests.helpers.tiny import save_tiny_pair

COMMANDS = (
    ["generate", "--prompt", "hi"],
    ["chat"],
    ["verify"],
    ["benchmark"],
    ["tune"],
)
UNCONVERTED = "an unconverted {} checkpoint"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``adapter`` and ``peft``, the adapter as a PEFT checkpoint."""
    root = tmp_path_factory.mktemp("sources")
    model, adapter = save_tiny_pair(root)
    export_adapter(str(adapter), root / "peft", base_model=str(model))
    return root


def save(folder: Path, tensors: dict[str, mx.array], config: dict | None, name: str) -> Path:
    folder.mkdir()
    mx.save_safetensors(str(folder / name), tensors)
    if config is not None:
        is_peft = "peft_type" in config
        file = folder / ("adapter_config.json" if is_peft else "config.json")
        file.write_text(json.dumps(config))
    return folder


def peft(folder: Path, sources: Path) -> Path:
    return Path(shutil.copytree(sources / "peft", folder))


def glora(folder: Path, sources: Path) -> Path:
    del sources
    tensors = samples.glora_tensors(fused=False)
    return save(folder, tensors, samples.glora_config(), "model.safetensors")


def uno(folder: Path, sources: Path) -> Path:
    del sources
    names = ("q_proj", "v_proj")
    tensors = {
        f"base_model.model.model.layers.0.self_attn.{name}.lora_{half}.weight": mx.ones((2, 2))
        for name in names
        for half in "AB"
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "a/b"}
    return save(folder, tensors, config, "adapter_model.safetensors")


def state_dict(folder: Path, sources: Path) -> Path:
    del sources
    return save(folder, samples.state_tensors(), None, "mtp.safetensors")


def pickled_peft(folder: Path, sources: Path) -> Path:
    peft(folder, sources)
    for path in folder.glob("*.safetensors"):
        torch.save(list(mx.load(str(path))), path.with_suffix(".bin"))
        path.unlink()
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "peft": (peft, "peft-mtp"),
    "glora": (glora, "mtp-glora"),
    "uno": (uno, "peft-lora"),
    "state dict": (state_dict, "state-dict"),
    "pickled": (pickled_peft, "peft-mtp"),
}


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and what was printed; an error is one line."""
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0 or result.stderr.count("\n") == 1, result.stderr
    return result.exit_code, result.stderr + result.stdout


def everywhere(path: Path) -> str:
    """The one line about a model that all commands print, and ``inspect`` as well."""
    lines = {run(*command, "--model", path) for command in COMMANDS}
    ((code, line),) = lines
    assert code == 2 and line.startswith("Error: "), lines
    line = line.removeprefix("Error: ").strip()
    assert line in run("inspect", path)[1]
    assert json.loads(run("inspect", "--json", path)[1])["use"] == line
    return line


def command_in(line: str) -> list[str]:
    """The arguments of the conversion that a line names."""
    text = line.partition("convert it with ")[2].partition(", or use")[0]
    words = shlex.split(text)
    assert words[:2] == ["mlx-mtp", "convert"], line
    return words[1:]


@pytest.mark.parametrize(
    ("name", "where"),
    # In a model's own folder, a GLoRA checkpoint would have the names of the model's files.
    sorted({*itertools.product(LAYOUTS, ["adapter", ".", "alone"])} - {("glora", ".")}),
)
def test_checkpoints_are_named_with_their_conversion(
    sources: Path, tmp_path: Path, name: str, where: str
) -> None:
    make, layout = LAYOUTS[name]
    checkpoint = make(tmp_path / "alone", sources)
    path = checkpoint
    if where != "alone":
        path = Path(shutil.copytree(sources / "model", tmp_path / "both"))
        shutil.copytree(checkpoint, path / where, dirs_exist_ok=True, ignore=_tokenizer)
    line = everywhere(path)
    assert f"{path} {'is' if where == 'alone' else 'has'} {UNCONVERTED.format(layout)}" in line
    arguments = command_in(line)
    assert arguments[arguments.index("--mtp-path") + 1] == str(path)
    assert ("--allow-pickle" in arguments) == (name == "pickled")
    if where == "alone":
        code, line = run("generate", "--model", sources / "model", "--adapter-path", path)
        assert code == 2 and UNCONVERTED.format(layout) + ", not an adapter" in line
        model = ["--base-model", str(sources / "model")]
        assert " ".join(model) in " ".join(command_in(line))
    else:
        code, _ = run("generate", "--model", path, "--no-mtp", "--prompt", "a", "--max-tokens", 2)
        assert code == 0


def _tokenizer(folder: str, names: list[str]) -> list[str]:
    del folder
    return [name for name in names if "token" in name or "chat" in name]


@pytest.mark.parametrize("where", ["adapter", "."])
def test_the_named_conversion_works(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = Path(shutil.copytree(sources / "model", tmp_path / "a model"))
    shutil.copytree(sources / "peft", path / where, dirs_exist_ok=True, ignore=_tokenizer)
    monkeypatch.chdir(tmp_path)
    arguments = command_in(everywhere(path))
    assert run(*arguments, "--verify")[0] == 0
    code, printed = run("generate", "--model", arguments[-1], "--prompt", "hi", "--max-tokens", 8)
    assert code == 0 and "MTP (" in printed


def test_the_named_conversion_of_an_adapter_works(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (sources / "peft", sources / "peft" / "adapter_model.safetensors"):
        model = ("--model", sources / "model")
        arguments = command_in(run("generate", *model, "--adapter-path", path)[1])
        assert run(*arguments, "--force")[0] == 0
        code, printed = run(
            "generate", *model, "--adapter-path", arguments[-1], "--prompt", "hi", "--max-tokens", 8
        )
        assert code == 0 and "MTP (" in printed


def test_an_adapter_in_the_model_s_own_folder_is_used(sources: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sources / "model", tmp_path / "both"))
    shutil.copytree(sources / "adapter", path, dirs_exist_ok=True)
    assert "MTP (" in run("generate", "--model", path, "--prompt", "hi", "--max-tokens", 8)[1]
    assert json.loads(run("inspect", "--json", path)[1])["kind"] == "bundle"


def test_other_things_in_place_of_a_model(sources: Path, tmp_path: Path) -> None:
    model, adapter = sources / "model", sources / "adapter"
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    pickled = Path(shutil.copytree(bare, tmp_path / "pickled"))
    tensors = {name: torch.tensor(value.tolist()) for name, value in _weights(model).items()}
    torch.save(tensors, pickled / "pytorch_model.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "mtp.pt")
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    both = Path(shutil.copytree(model, tmp_path / "both"))
    for folder in (tmp_path / "run", both):
        torch.save({"a": torch.ones(2)}, folder / "mtp.pth")
    lines = {
        adapter: f"use --model tiny-llama --adapter-path {adapter}",
        adapter / "adapters.safetensors": f"use its folder, --adapter-path {adapter}",
        model / "model.safetensors": f"use its folder, --model {model}",
        tmp_path / "run": f"--mtp-path {tmp_path}/run --allow-pickle --mlx-path run-mlx",
        pickled: f"mlx-mtp convert --hf-path {pickled} --allow-pickle --mlx-path pickled-mlx",
        bare: "it has no weights",
        both / "mtp.pth": f"--hf-path {both} --mtp-path {both}/mtp.pth --allow-pickle",
        tmp_path / "mtp.pt": f"--mtp-path {tmp_path}/mtp.pt --allow-pickle --mlx-path mtp-mlx",
        tmp_path / "x.gguf": "is not a GGUF file",
        tmp_path / "empty": "is not a model folder (it has no config.json)",
    }
    for path, expected in lines.items():
        line = everywhere(path)
        assert str(path) in line and expected in line
        if path != adapter:
            code, line = run("generate", "--model", model, "--adapter-path", path)
            assert code == 2 and str(path) in line and line.startswith("Error: ")
    arguments = command_in(everywhere(pickled))
    assert run(*arguments[:-1], tmp_path / "out")[0] == 0
    assert run("generate", "--model", tmp_path / "out", "--prompt", "a", "--no-mtp")[0] == 0
    code, line = run("generate", "--model", model, "--adapter-path", model)
    assert code == 2 and f"is a model, not an adapter: use --model {model}" in line


def _weights(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b"\xff"):
        for name in ("adapter_config.json", "latest.json", "x.safetensors"):
            (tmp_path / name).write_bytes(content)
        assert look(tmp_path).kind == look(tmp_path / "x.safetensors").kind == "unknown"
    assert look(tmp_path / "nowhere").kind == "unknown"
