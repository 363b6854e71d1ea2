"""``--draft-model``: what it takes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_mtp.cli.main import cli
from tests.helpers.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model without an adapter, and a smaller one with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    draft = save_tiny_model(root / "draft", "gemma3_text", num_hidden_layers=2)
    return save_tiny_model(root / "model", "qwen3", num_hidden_layers=3), draft


def generate(model: Path, *arguments: str) -> Result:
    shared = ["generate", "--model", str(model), "--prompt", "Why?", "-m", "12"]
    return CliRunner().invoke(cli, [*shared, *arguments])


def test_the_answer_is_the_plain_one_and_the_drafter_is_named(folders: tuple[Path, Path]) -> None:
    model, draft = folders
    plain = json.loads(generate(model, "--json", "--layout", "plain").stdout)
    done = generate(model, "--draft-model", str(draft), "--layout", "linear", "--json")
    assert done.exit_code == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert found["tokens"] == plain["tokens"]
    assert set(found["stats"]["drafters"]) == {"draft-model"}
    few = generate(
        model, "--draft-model", str(draft), "--layout", "linear", "--num-draft-tokens", "2"
    )
    assert "MTP (draft-model): " in few.stdout
    alone = generate(model, "--draft-model", str(draft), "--no-mtp")
    assert alone.exit_code == 0 and "MTP" not in alone.stdout


def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=1)
    file = other / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<user>", "<you>"), encoding="utf-8")
    reason = f"draft model {other} needs the same tokenizer as the model, but it has no token"
    missing = tmp_path / "nowhere"
    for folder, message in ((other, reason), (missing, f"draft model: model {missing} does not")):
        refused = generate(folders[0], "--draft-model", str(folder))
        assert (refused.exit_code, refused.stdout) == (2, "")
        [line] = refused.stderr.splitlines()
        assert line.startswith("Error: ") and message in line
    without = generate(folders[0], "--drafter", "draft-model")
    assert without.exit_code == 2 and "has no draft model" in without.stderr
