"""``mlx-mtp inspect``: what a folder or file is, and what would be refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_mtp.cli.main import cli
from mlx_mtp.converters.base.summary import layer_kinds, summarise
from mlx_mtp.converters.convert import convert_model
from mlx_mtp.converters.export import export_adapter
from tests.helpers.fixtures_generate import EOS
from tests.helpers.tiny import BYTE_VOCAB, save_tiny_pair, tiny_base


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model folder, an adapter for it, and the adapter as a PEFT checkpoint."""
    root = tmp_path_factory.mktemp("sources")
    model, adapter = save_tiny_pair(root)
    export_adapter(str(adapter), root / "checkpoint", base_model=str(model))
    return model, adapter, root / "checkpoint"


def look(*args: object) -> dict:
    """The JSON object that the command prints."""
    result = CliRunner().invoke(cli, ["inspect", "--json", *map(str, args)])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def text(*args: object) -> str:
    result = CliRunner().invoke(cli, ["inspect", *map(str, args)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_an_adapter(sources: tuple[Path, Path, Path]) -> None:
    found = look(sources[1])
    assert found["kind"] == "adapter" and found["problems"] == []
    facts = found["facts"]
    assert (facts["k"], facts["rank"], facts["scale"]) == (4, 4, 2.0)
    assert facts["base"] == "tiny-llama" and "q_proj" in facts["targets"]
    assert facts["sampler"] == "mlp, layer norm, residual hidden"
    weights = sources[1] / "adapters.safetensors"
    (file,) = (file for file in found["files"] if file["name"] == weights.name)
    assert file["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert file["num_bytes"] == weights.stat().st_size and list(file["tensors"]) == ["F32"]


def test_a_checkpoint(sources: tuple[Path, Path, Path]) -> None:
    found = look(sources[2])
    assert found["kind"] == "checkpoint" and found["problems"] == []
    facts = found["facts"]
    assert (facts["layout"], facts["k"], facts["rank"]) == ("peft-mtp", 4, 4)
    assert facts["base"] == "tiny-llama" and "down_proj" in facts["targets"]
    shown = text(sources[2])
    assert "peft-mtp" in shown and "adapter_model.safetensors" in shown and "sha256" in shown


def test_what_would_be_refused(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for path in sources[2].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    found = look(copy)
    assert found["kind"] == "checkpoint" and "dora" in " ".join(found["problems"]).lower()
    assert "refused: " in text(copy)


def test_a_model_and_a_bundle(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = look(sources[0])
    assert (found["kind"], found["problems"], found["adapter"]) == ("model", [], None)
    facts = found["facts"]
    assert (facts["model_type"], facts["layers"], facts["tokenizer"]) == ("llama", 2, "fast")
    convert_model(str(sources[0]), tmp_path / "out", checkpoint=sources[2])
    bundle = look(tmp_path / "out")
    assert bundle["kind"] == "bundle"
    assert bundle["adapter"]["kind"] == "adapter" and bundle["adapter"]["facts"]["k"] == 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"auto_map": {"AutoModel": "m.py"}}, "config.json requires custom code (auto_map)"),
        ({"model_file": "m.py"}, "config.json requires custom code (model_file)"),
        ({"model_type": "mamba"}, "cannot"),
        ({"model_type": "no_such_thing"}, "no_such_thing"),
    ],
)
def test_models_that_would_be_refused(
    sources: tuple[Path, Path, Path], tmp_path: Path, changes: dict, problem: str
) -> None:
    for path in sources[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert problem in " ".join(look(tmp_path)["problems"])


def test_broken_weights_are_named(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for path in sources[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (problem,) = look(tmp_path)["problems"]
    assert "adapters.safetensors" in problem


def test_a_pickle_is_listed_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "drafter.pt"
    torch.save({"layers.0.q_proj.lora_A": torch.ones(2, 4), "alpha": EOS}, path)
    found = look(path)
    assert found["kind"] == "unknown"
    assert "--allow-pickle" in found["problems"][0]
    assert "torch._utils._rebuild_tensor_v2" in " ".join(found["facts"]["pickle_globals"])


def test_nothing_there() -> None:
    result = CliRunner().invoke(cli, ["inspect", "/no/such/folder"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["Error: checkpoint /no/such/folder does not exist"]


def test_what_a_base_model_is(sources: tuple[Path, Path, Path]) -> None:
    facts = look(sources[0])["facts"]
    assert facts["usable"] == "yes" and facts["layer_kinds"] == {"attention": 2}
    assert (facts["vocabulary"], facts["context"]) == (BYTE_VOCAB, 4096)
    assert facts["linear_layers"]["q_proj"] == 2 and "lm_head" not in facts["linear_layers"]
    assert "rank 32" in facts["training"] and facts["adapter"].startswith("none: ")
    shown = text(sources[0])
    assert "usable" in shown and "attention 2" in shown


def test_kinds_of_layers() -> None:
    assert layer_kinds(tiny_base("gemma3_text")) == {"window 6": 2, "attention": 1}
    assert layer_kinds(tiny_base("qwen3_moe")) == {"attention": 1, "attention, experts": 1}
    parameters: Any = tree_flatten(tiny_base("llama").parameters())
    for quantised in (False, True):
        base = tiny_base("llama", quantised=quantised)
        assert summarise(base)["model_parameters"] == sum(value.size for _, value in parameters)


def test_large_files_are_hashed_on_request(
    sources: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mtp.converters.inspection.HASHED_BYTES", 1000)

    def hashes(*options: str) -> dict[str, bool]:
        files = look(sources[0], *options)["files"]
        return {file["name"]: file["sha256"] is not None for file in files}

    assert hashes()["config.json"] and not hashes()["model.safetensors"]
    assert all(hashes("--hash").values())
    assert "model.safetensors" in text(sources[0])


def test_a_target_that_the_model_lacks(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    convert_model(str(sources[0]), tmp_path / "out", checkpoint=sources[2])
    assert look(tmp_path / "out")["problems"] == []
    path = tmp_path / "out" / "adapter" / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"q_proj"', '"qkv"'))
    problems = look(tmp_path / "out")["problems"]
    assert problems == ["the model has no linear layer qkv, the adapter's target"]
