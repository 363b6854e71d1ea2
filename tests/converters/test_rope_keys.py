"""What transformers 5 writes about rotary embeddings, in the keys that mlx-lm reads."""

from __future__ import annotations

from mlx_mtp.converters.base.rope import older_rope_keys


def test_base_frequency() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert older_rope_keys({"rope_parameters": rope}) == {"rope_theta": 5e5}


def test_scaling() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope = {"rope_theta": 5e5, "partial_rotary_factor": 0.5, **scaling}
    assert older_rope_keys({"rope_parameters": rope}) == {
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        "rope_scaling": scaling,
    }


def test_kinds_of_layers() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert older_rope_keys({"rope_parameters": rope}) == {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }


def test_text_config() -> None:
    inner = {"hidden_size": 8, "rope_parameters": {"rope_theta": 7.0}}
    assert older_rope_keys({"text_config": inner}) == {"text_config": {**inner, "rope_theta": 7.0}}


def test_older_keys_win() -> None:
    config = {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_theta": 5e5}}
    assert older_rope_keys(config) == {}
    assert older_rope_keys(config | {"rope_theta": None}) == {"rope_theta": 5e5}


def test_nothing_to_say() -> None:
    assert older_rope_keys({}) == {}
    assert older_rope_keys({"rope_parameters": None, "text_config": {}}) == {}
