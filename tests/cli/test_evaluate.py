"""``mlx-mtp evaluate``: what it measures, and what it stores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_mtp.cli.main import cli
from mlx_mtp.evaluation.acceptance import evaluate
from mlx_mtp.evaluation.greedy_texts import GreedyText
from mlx_mtp.loading import load
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, read_any_config
from mlx_mtp.model.statistics import STATISTICS_FILE, read_statistics
from tests.helpers.tiny import random_heads, save_adapter, save_tiny_pair

PROMPTS = [("a", "code", "one"), ("b", "chat", "two two"), ("c", "code", "three")]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    lines = [json.dumps({"id": id, "kind": kind, "prompt": text}) for id, kind, text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return save_tiny_pair(tmp_path)


def run(pair: tuple[Path, Path], *words: str) -> Result:
    model, adapter = pair
    options = ["--model", str(model), "--adapter-path", str(adapter), "-m", "24"]
    options += ["--prompts", str(model.parent / "prompts.jsonl"), *words]
    return CliRunner().invoke(cli, ["evaluate", *options])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_reports_what_an_evaluation_of_the_same_texts_finds(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    before = files(pair[1])
    result = run(pair, "--json", "--texts", str(tmp_path / "texts.jsonl"))
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    _, *lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    texts = [GreedyText(**json.loads(line)).sequence for line in lines]
    model, _ = load(str(pair[0]), adapter_path=str(pair[1]))
    found = evaluate(model, texts)
    assert values["tokens_per_step"]["all"] == round(found.tokens_per_step, 3)
    assert values["acceptance"]["all"] == [round(rate, 4) for rate in found.acceptance]
    assert set(values["acceptance"]) == {"code", "chat", "all"} == set(values["tokens_per_step"])
    assert values["source"] == "3 greedy answers of at most 24 tokens, prompts prompts.jsonl"
    assert files(pair[1]) == before


def test_it_stores_the_result_with_the_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        json.dumps({"text": "an answer of the model"}) + "\n" + '{"text": "zzzzzzzzzz"}'
    )
    before = files(pair[1])
    result = run(pair, "--save", "--training-text", str(data), "--training-text", str(data))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"saved in {pair[1]}"
    after = files(pair[1])
    assert after[WEIGHTS_FILE] == before[WEIGHTS_FILE] and set(after) == {*before, STATISTICS_FILE}
    config = read_any_config(pair[1])
    found = read_statistics(pair[1], config)
    assert found is not None and found.vocabulary is not None
    assert list(found.kinds) == ["code", "chat"] and len(config.acceptance) == 4
    _, tokenizer = load(str(pair[0]), mtp=False)
    ids = [
        token for text in ("an answer of the model", "z" * 10) for token in tokenizer.encode(text)
    ]
    assert found.vocabulary.num_tokens == len(ids)  # the same file twice is counted once
    assert set(found.vocabulary.ids) == set(ids)
    again = run(pair, "--save", "--kinds", "chat")  # without --training-text: the counts stay
    assert again.exit_code == 0, again.output
    kept = read_statistics(pair[1], read_any_config(pair[1]))
    assert kept is not None and kept.vocabulary == found.vocabulary and list(kept.kinds) == ["chat"]
    shown = CliRunner().invoke(cli, ["inspect", str(pair[1])]).stdout
    assert "draft vocabulary: " in shown and "rank of the right token" in shown
    values = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(pair[1])]).stdout)
    assert values["statistics"] == json.loads(json.dumps(kept.summary()))


def test_inspect_names_a_damaged_file(pair: tuple[Path, Path]) -> None:
    (pair[1] / STATISTICS_FILE).write_text("{}")
    result = CliRunner().invoke(cli, ["inspect", "--json", str(pair[1])])
    values = json.loads(result.stdout)
    assert values["problems"] == [] and values["statistics"] is None
    assert values["facts"]["statistics"].startswith("not used: " + str(pair[1] / STATISTICS_FILE))


def test_heads_are_evaluated_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = load(str(pair[0]), mtp=False)[0].base
    heads = save_adapter(tmp_path / "heads", *random_heads(base))
    result = run((pair[0], heads), "--save")
    assert result.exit_code == 0, result.output
    assert read_statistics(heads, read_any_config(heads)) is not None


def test_an_adapter_that_must_not_be_changed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (linked / name).symlink_to(pair[1] / name)
    result = run((pair[0], linked), "--save")
    assert result.exit_code == 2 and "consists of links" in result.stderr
    assert len(list(linked.iterdir())) == 2


def test_an_adapter_that_is_replaced_meanwhile(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_mtp.evaluation import acceptance

    count = acceptance.count_answers

    def replaced(*args: Any, **options: Any) -> Any:
        os.utime(pair[1] / WEIGHTS_FILE, ns=(1, 1))
        return count(*args, **options)

    monkeypatch.setattr(acceptance, "count_answers", replaced)
    before = files(pair[1])
    result = run(pair, "--save")
    assert result.exit_code == 2 and "was replaced during the evaluation" in result.stderr
    assert files(pair[1]) == before


def test_without_an_adapter(pair: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli, ["evaluate", "--model", str(pair[0])])
    assert result.exit_code == 2 and "no adapter" in result.stderr
