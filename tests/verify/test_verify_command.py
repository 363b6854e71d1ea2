"""``mlx-mtp verify``: its prompts, its verdicts, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_mtp.cli.main import cli
from mlx_mtp.cli.verify import choose_prompts
from tests.helpers.tiny import save_tiny_model, save_tiny_pair
from tests.verify.verify_faults import accept_first_draft


def test_choosing_prompts(tmp_path: Path) -> None:
    chosen = choose_prompts("builtin", (), None)
    assert len(chosen) == 12 and len({prompt.kind for prompt in chosen}) == 6
    assert [p.kind for p in choose_prompts("builtin", ("code", "chat"), 3)] == [
        "chat",
        "chat",
        "code",
    ]
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"{i}", "kind": "a" if i < 3 else "b"} for i in range(4)]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert len(choose_prompts(str(path), (), None)) == 4
    assert [p.text for p in choose_prompts(str(path), (), 2)] == ["0", "3"]
    assert [p.text for p in choose_prompts(str(path), ("a",), None)] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no prompts of kind c, only of a, b"):
        choose_prompts(str(path), ("c",), None)
    with pytest.raises(ValueError, match="--num-prompts is 5, but there are 4"):
        choose_prompts(str(path), (), 5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


def invoke(pair: tuple[Path, Path], *arguments: str) -> Result:
    model, adapter = pair
    head = ["verify", "--model", str(model), "--adapter-path", str(adapter)]
    return CliRunner().invoke(cli, [*head, *arguments])


SMALL = (
    "--num-prompts",
    "1",
    "--max-tokens",
    "4",
    "--layouts",
    "quadratic",
    "--num-draft-tokens",
    "1,2",
)


def test_the_command_ends_well(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    result = invoke(pair, *SMALL, "--no-sampling", "--output-file", str(path))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "Greedy: 4 tokens over 1 prompts, float32" in result.stdout
    assert "1 identical, 0 near-ties, 0 mismatches" in result.stdout
    receipt = json.loads(path.read_text(encoding="utf-8"))
    assert set(receipt["model"]["sha256"]) == {"config.json", "model.safetensors"}
    assert set(receipt["adapter"]["sha256"]) == {"adapter_config.json", "adapters.safetensors"}
    assert all(len(digest) == 64 for digest in receipt["model"]["sha256"].values())
    assert receipt["settings"]["depths"] == [1, 2]


def test_the_command_prints_json(pair: tuple[Path, Path]) -> None:
    result = invoke(pair, *SMALL, "--num-draws", "2", "--json")
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    assert receipt["greedy"]["num_tokens"] == 4 and len(receipt["sampling"]["tests"]) > 0


def test_a_mistake_ends_the_command_with_1(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accept_first_draft(monkeypatch)
    path = tmp_path / "receipt.json"
    result = invoke(pair, *SMALL, "--no-sampling", "--output-file", str(path))
    assert result.exit_code == 1
    assert "MISMATCH" in result.stdout and "NOT identical" in result.stdout
    assert json.loads(path.read_text(encoding="utf-8"))["verdict"] == "mismatch"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", "no-such.jsonl"), "no-such.jsonl: No such file"),
        (("--kinds", "poems"), "poems"),
        (("--layouts", "cubic"), "cubic"),
        (("--layouts", ""), "none"),
        (("--num-draft-tokens", "one"), "'one' is not a list of numbers"),
        (("--num-draft-tokens", "9"), "depth 9 exceeds the adapter's number of mask tokens, 4"),
        (("--max-tokens", "0"), "max_tokens must be at least 1, got 0"),
        (("--num-draws", "0"), "num_draws must be at least 1, got 0"),
        (("--num-prompts", "1000"), "there are 72 prompts"),
        (("--output-file", "no-such-folder/receipt.json"), "does not exist"),
        (("--output-file", "."), "is a folder"),
    ],
)
def test_bad_input_ends_the_command_with_2(
    pair: tuple[Path, Path], arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(pair, *SMALL, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_the_quick_check(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    result = invoke(pair, "--quick", "--max-tokens", "5", "--output-file", str(path))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Quick check: a few tokens of a few prompts."
    assert lines[1].startswith("Greedy: 10 tokens over 2 prompts")
    assert [line.split()[:2] for line in lines[3:7]] == [
        ["plain", "-"],
        ["linear", "4"],
        ["quadratic", "4"],
        ["tree", "4"],
    ]
    receipt = json.loads(path.read_text(encoding="utf-8"))
    assert receipt["quick"] is True and receipt["settings"]["is_quick"] is True
    assert receipt["settings"]["num_draws"] == 20
    assert {test["layout"] for test in receipt["sampling"]["tests"]} == {"quadratic"}
    assert receipt["greedy"]["steps"]["compared"] > 0


def test_a_model_without_an_adapter(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    head = ["verify", "--model", str(folder), "--max-tokens", "12"]
    result = CliRunner().invoke(cli, [*head, "--quick", "--json"])
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    assert receipt["adapter"] is None and receipt["verdict"] == "identical"
    plain, copied = receipt["greedy"]["runs"]
    assert (plain["layout"], copied["layout"]) == ("plain", "copy")
    assert 0 < copied["num_accepted"] < copied["num_drafts"]
    assert copied["against"]["stock"]["identical"] == 2
    result = CliRunner().invoke(cli, [*head, *SMALL])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "has no MTP adapter, which layout quadratic needs: --layouts copy" in result.stderr
