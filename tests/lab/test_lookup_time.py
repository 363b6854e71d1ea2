"""The processor time of lookup is measured over whole texts."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_mtp.lab.lookup_time import main, texts, time_lookup
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS
from tests.helpers.fixtures_generate import byte_tokenizer


def test_all_steps_of_a_text_are_counted() -> None:
    times = time_lookup([7] * 50, [7] * 3 * (MAX_LOOKUP_TOKENS + 1))
    assert times.tokens_per_step == MAX_LOOKUP_TOKENS + 1 and times.found == 1
    assert time_lookup([1, 2, 3], [4, 5, 6]).tokens_per_step == 1
    assert time_lookup([1, 2, 3], [4, 5, 6]).found == 0
    assert 0 < times.step_us_p50 <= times.step_us_p99 and times.index_ms > 0


def test_there_are_texts_of_several_kinds() -> None:
    made = dict(texts(lambda text: list(text.encode()), 1000))
    assert set(made) == {"manual", "code", "log", "equal"}
    assert all(len(ids) >= 1000 for ids in made.values())
    assert len({tuple(ids[:1000]) for ids in made.values()}) == 4


def test_the_command_ends_in_a_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mtp.loading.load", lambda *_, **__: (None, byte_tokenizer()))
    done = CliRunner().invoke(main, ["--length", "500", "--steps", "40"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout.splitlines()[-1])["texts"]) == 4
    done = CliRunner().invoke(main, ["--length", str(10**9)])
    assert done.exit_code == 2 and "manual has only" in done.output
