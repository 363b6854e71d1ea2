"""The measurement of shared forwards, on a tiny model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.lab import sharing
from mlx_mtp.planning.auto import Speculation
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, tiny_mtp

PROMPTS = [[1, 2, 3], [7, 8], [5] * 9]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sharing, "calibrate", lambda *_, **__: None)
    monkeypatch.setattr(sharing, "speculation_for", lambda _: Speculation.guess(3))
    return tiny_mtp("llama", k=3, vocab_size=BYTE_VOCAB)


def test_every_way_gives_the_same_answers_and_is_run_as_often(model):
    said: list[str] = []
    runs = sharing.measure(
        model, PROMPTS, layouts=["plain", "auto"], max_tokens=7, rounds=2, on_status=said.append
    )
    ways = ["plain by turns", "plain shared", "auto by turns", "auto shared"]
    assert list(runs) == ways and len(said) == 8
    assert all(len(each) == 2 for each in runs.values())
    found = sharing.summarise(runs)
    assert all(each["different"] == 0 and each["tps"] > 0 for each in found.values())
    assert found["plain by turns"]["speedup"] == 1.0
    assert {len(ids) for each in runs.values() for run in each for ids in run.ids} == {7}


def test_other_answers_are_counted():
    same, other = sharing.Run([[1], [2]], 2, 2.0), sharing.Run([[1], [3]], 2, 1.0)
    found = sharing.summarise({"a": [same, same], "b": [other, same]})
    assert found["a"] == {"tps": 1.0, "speedup": 1.0, "different": 0}
    assert found["b"] == {"tps": 1.5, "speedup": 1.5, "different": 1}


def test_the_command_prints_lines_and_json(model, monkeypatch):
    monkeypatch.setattr("mlx_mtp.loading.load", lambda *_, **__: (model, byte_tokenizer()))
    ways = ["--answers", "1,2", "--max-tokens", "3", "--rounds", "1"]
    result = CliRunner().invoke(sharing.main, ways)
    assert result.exit_code == 0, result.output
    *lines, last = result.stdout.strip().splitlines()
    assert len(lines) == 8 and lines[-1].startswith("2 answers, auto shared")
    assert set(json.loads(last)["answers"]) == {"1", "2"}


@pytest.mark.parametrize(
    ("ways", "word"),
    [
        (["--layouts", "plain,cubic"], "cubic"),
        (["--answers", "0"], "answers"),
        (["--answers", "2,x"], "answers"),
        (["--answers", "999"], "999"),
    ],
)
def test_bad_options_are_told(ways, word):
    result = CliRunner().invoke(sharing.main, ways)
    assert result.exit_code == 2 and word in result.output
