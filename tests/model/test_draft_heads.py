"""Independent heads: what they compute, and one line about tensors and settings that do not fit."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.model.config import HEAD_KINDS, LAYER, HeadsConfig, read_any_config, read_config
from mlx_mtp.model.draft_heads import DraftHeads, layer_sizes, new_weights

DIMS, COUNT = 32, 3


def config_of(head: str, **values: Any) -> HeadsConfig:
    base: dict[str, Any] = {
        "base_model": "tiny",
        "base_model_type": "llama",
        "base_hidden_size": DIMS,
        "base_num_layers": 2,
        "base_vocab_size": 64,
        "base_fingerprint": "ab",
    }
    sizes: dict[str, Any] = layer_sizes(DIMS) if head == LAYER else {}
    return HeadsConfig(**({"num_draft_tokens": COUNT, "head": head} | base | sizes | values))


def heads_of(head: str, *, scale: float = 0.3) -> DraftHeads:
    rng = np.random.default_rng(0)
    config = config_of(head)
    weights = new_weights(config, key=mx.random.key(0))
    noisy = {k: v + mx.array(scale * rng.standard_normal(v.shape)) for k, v in weights.items()}
    return DraftHeads(config, noisy, dtype=mx.float32)


def states(rows: int, *, seed: int = 1) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((1, rows, DIMS)).astype(np.float32))


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_new_heads_leave_the_state_as_it_is(head: str) -> None:
    config = config_of(head)
    heads = DraftHeads(config, new_weights(config, key=mx.random.key(0)), dtype=mx.float32)
    hidden = states(5)
    assert mx.array_equal(heads(hidden), mx.broadcast_to(hidden, (COUNT, 5, DIMS)))


def test_an_mlp_is_the_published_block() -> None:
    heads, hidden = heads_of("mlp"), states(4)
    weight, bias, x = (np.array(value) for value in (heads.weight, heads.bias, hidden[0]))
    for index in range(COUNT):
        inner = x @ weight[index].T + bias[index]
        expected = x + inner / (1 + np.exp(-inner))
        np.testing.assert_allclose(np.array(heads(hidden)[index]), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_rows_may_come_in_pieces_and_be_dropped(head: str) -> None:
    heads, hidden = heads_of(head), states(9)
    whole = np.array(heads(hidden))
    cache = heads.make_cache()
    first = heads(hidden[:, :4], cache=cache)
    heads(states(3, seed=5), cache=cache)
    cache.rewind(3 if cache.layers else 0)
    rest = heads(hidden[:, 4:], cache=cache)
    pieces = mx.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(np.array(pieces), whole, rtol=1e-4, atol=1e-5)


def test_layers_see_earlier_rows_and_an_mlp_does_not() -> None:
    hidden, others = states(6), mx.concatenate([states(5, seed=9), states(6)[:, 5:]], axis=1)
    for head in HEAD_KINDS:
        heads = heads_of(head)
        same = mx.allclose(heads(hidden)[:, -1], heads(others)[:, -1], atol=1e-6).item()
        assert same == (not heads.remembers)


@pytest.mark.parametrize("head", HEAD_KINDS)
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_do_not_fit_are_refused(head: str, change: str) -> None:
    config = config_of(head)
    weights = new_weights(config, key=mx.random.key(0))
    name = sorted(weights)[0]
    if change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["mask_embeddings"] = mx.zeros((COUNT, DIMS))
    else:
        weights[name] = weights[name][..., :-1]
    with pytest.raises(ValueError, match="^heads: ") as error:
        DraftHeads(config, weights, dtype=mx.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dims", [16, 48, 64, 576, 960, 2048, 4096])
def test_a_layer_of_any_width_has_sizes(dims: int) -> None:
    sizes = layer_sizes(dims)
    assert dims % (2 * sizes["num_attention_heads"]) == 0
    assert dims // sizes["num_attention_heads"] <= 64
    assert 8 * dims / 3 <= sizes["intermediate_size"] < 8 * dims / 3 + 32


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_a_round_trip_through_json_changes_nothing(head: str, tmp_path: Any) -> None:
    config = config_of(head, acceptance=(0.5, 0.25, 0.25))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    assert read_any_config(tmp_path) == config
    with pytest.raises(ValueError, match="has independent heads, not mask tokens"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"head": "tree"}, "head must be one of mlp, layer, got 'tree'"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be at least 1, got 0"),
        ({"head": "layer", "num_attention_heads": 3}, "must divide half of 32, got 3"),
        ({"head": "layer", "num_attention_heads": 2}, "intermediate_size must be at least 1"),
        ({"fine_tune_type": "mtp"}, "fine_tune_type must be 'mtp-heads'"),
        ({"format_version": 2}, "format_version 2 is not supported"),
        ({"acceptance": [0.5]}, "acceptance must be 3 shares"),
        ({"rank": 8}, "unknown keys: rank"),
    ],
)
def test_a_bad_configuration_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HeadsConfig.from_dict(config_of("mlp").to_dict() | values)
