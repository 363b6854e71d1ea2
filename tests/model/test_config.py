"""adapter_config.json: a round trip, and one line about whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.model.config import CONFIG_FILE, MTPConfig, read_config

VALUES: dict[str, Any] = {
    "num_draft_tokens": 4,
    "rank": 32,
    "scale": 2.0,
    "target_modules": ["q_proj", "v_proj"],
    "sampler": "mlp",
    "base_model": "some-model",
    "base_model_type": "llama",
    "base_hidden_size": 64,
    "base_num_layers": 2,
    "base_vocab_size": 260,
    "base_fingerprint": "ab" * 32,
}

configs = st.builds(
    MTPConfig,
    num_draft_tokens=st.integers(1, 64),
    rank=st.integers(1, 512),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    target_modules=st.lists(st.text(max_size=8), max_size=4).map(tuple),
    sampler=st.sampled_from([None, "mlp"]),
    base_model=st.text(max_size=20),
    base_model_type=st.text(max_size=20),
    base_hidden_size=st.integers(1, 10**6),
    base_num_layers=st.integers(1, 1000),
    base_vocab_size=st.integers(1, 10**6),
    base_fingerprint=st.text(max_size=20),
    sampler_norm=st.sampled_from(["layer", "rms"]),
    sampler_norm_eps=st.floats(0, 1),
    sampler_bias=st.booleans(),
    sampler_residual=st.sampled_from(["hidden", "inner", "none"]),
    rank_pattern=st.dictionaries(st.text(max_size=8), st.integers(1, 512), max_size=3),
    scale_pattern=st.dictionaries(
        st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=3
    ),
    noise_ids=st.just(()),
)


@given(configs)
def test_a_round_trip_through_json_changes_nothing(config: MTPConfig) -> None:
    assert MTPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_file_holds_no_key_that_mlx_lm_would_take_for_its_own() -> None:
    keys = MTPConfig.from_dict(VALUES).to_dict().keys()
    assert not keys & {"num_layers", "lora_parameters", "lora_layers"}


@pytest.mark.parametrize("ids", [[1, 260], [0, 1]])
def test_a_range_of_random_ids(ids: list[int]) -> None:
    config = MTPConfig.from_dict({**VALUES, "noise_ids": ids})
    assert config.noise_ids == tuple(ids) and config.to_dict()["noise_ids"] == ids
    assert "4 mask rows of random tokens" in config.describe()


@pytest.mark.parametrize("ids", [[1], [1, 261], [5, 5], [-1, 5], [1, 2, 3], ["1", "2"], [1.5, 3]])
def test_a_range_that_cannot_be(ids: list[Any]) -> None:
    with pytest.raises(ValueError, match="noise_ids must be"):
        MTPConfig.from_dict({**VALUES, "noise_ids": ids})


def test_an_ordinary_adapter_says_nothing_of_later_keys() -> None:
    assert set(MTPConfig.from_dict(VALUES).to_dict()) == set(VALUES) | {
        "fine_tune_type",
        "format_version",
    }


def test_a_layer_may_have_its_own_rank_and_scale() -> None:
    patterns = {"rank_pattern": {"a.q": 8}, "scale_pattern": {"a.q": 3}}
    config = MTPConfig.from_dict({**VALUES, **patterns})
    assert (config.rank_of("a.q"), config.rank_of("a.v")) == (8, 32)
    assert (config.scale_of("a.q"), config.scale_of("a.v")) == (3.0, 2.0)


def test_whole_numbers_and_nulls_are_taken() -> None:
    config = MTPConfig.from_dict({**VALUES, "scale": 2, "sampler": None})
    assert config.scale == 2.0 and isinstance(config.scale, float) and config.sampler is None
    assert config.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "unknown keys: num_layers"),
        ({"zeta": 1, "alpha": 2}, "unknown keys: alpha, zeta"),
        ({"rank": None}, "rank must be int, got None"),
        ({"rank": "32"}, "rank must be int, got '32'"),
        ({"rank": 2.5}, "rank must be int, got 2.5"),
        ({"rank": True}, "rank must be int, got True"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"num_draft_tokens": -1}, "num_draft_tokens must be at least 1, got -1"),
        ({"base_hidden_size": 0}, "base_hidden_size must be at least 1, got 0"),
        ({"base_num_layers": 0}, "base_num_layers must be at least 1, got 0"),
        ({"scale": "big"}, "scale must be float, got 'big'"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of strings, got 'q_proj'"),
        ({"target_modules": [1]}, r"target_modules must be a list of strings, got \[1\]"),
        ({"sampler": "rnn"}, "sampler must be 'mlp' or null, got 'rnn'"),
        ({"sampler": 3}, "sampler must be str or null, got 3"),
        ({"base_model": None}, "base_model must be str, got None"),
        ({"fine_tune_type": "lora"}, "fine_tune_type must be 'mtp', got 'lora'"),
        ({"format_version": 2}, "format_version 2 is not supported"),
        ({"sampler_norm": "batch"}, "sampler_norm must be one of .*, got 'batch'"),
        ({"sampler_residual": "z"}, "sampler_residual must be one of .*, got 'z'"),
        ({"sampler_norm_eps": -1}, "sampler_norm_eps must be 0 or more, got -1.0"),
        ({"sampler_bias": 1}, "sampler_bias must be bool, got 1"),
        ({"rank_pattern": [4]}, r"rank_pattern must be an object, got \[4\]"),
        ({"rank_pattern": {"x": 2.5}}, "rank_pattern: x must be int, got 2.5"),
        ({"rank_pattern": {"x": 0}}, "rank_pattern: x must be at least 1, got 0"),
        ({"scale_pattern": {"x": float("nan")}}, "scale_pattern: x must be a finite number"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MTPConfig.from_dict({**VALUES, **changes})
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**VALUES, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", VALUES)
def test_every_missing_key_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"missing keys: {name}$"):
        MTPConfig.from_dict({key: value for key, value in VALUES.items() if key != name})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"{", "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b"{}", "missing keys: num_draft_tokens, rank"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_the_file_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an adapter folder: it has no adapter_config.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="is not an adapter folder"):
        read_config(tmp_path / "nowhere")
