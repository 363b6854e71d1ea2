"""Tensors of adapter files: packed as MLX packs them, restored to the same numbers everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.loading import load, read_adapter
from mlx_mtp.model.adapter_file import from_file, is_quantised, rounded, to_file
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, MTPConfig, read_config
from mlx_mtp.train.run.checkpoint import adapter_file_bytes, save_adapter
from tests.helpers.fixtures_generate import EOS
from tests.helpers.tiny import (
    BYTE_VOCAB,
    random_adapter,
    save_tiny_model,
    tiny_base,
)

A, B = "model.layers.0.mlp.down_proj.lora_a", "model.layers.0.mlp.down_proj.lora_b"
LINEAR = "sampler_head.linear_1.weight"


def adapter(**changes: object) -> tuple[MTPConfig, dict[str, mx.array]]:
    config, weights = random_adapter(tiny_base("llama"))
    return dataclasses.replace(config, group_size=32, **changes), weights


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_low_rank_weights_are_packed_by_mlx_along_their_long_axis(bits):
    config, weights = adapter(bits=bits)
    tensors = to_file(weights, config)
    for name, rows in ((A, weights[A].T), (B, weights[B])):
        packed, scales, biases = mx.quantize(rows, group_size=32, bits=bits)
        assert mx.array_equal(tensors[f"{name}.weight"], packed)
        assert mx.array_equal(tensors[f"{name}.scales"], scales.astype(mx.float16))
        assert mx.array_equal(tensors[f"{name}.biases"], biases.astype(mx.float16))
        assert name not in tensors
    assert tensors[LINEAR].dtype == mx.float16  # sampler_bits is 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_are_restored_as_exact_arithmetic_does(bits):
    config, weights = adapter(bits=bits, sampler_bits=bits)
    tensors = to_file(weights, config)
    found = from_file(tensors, config)
    assert set(found) == set(weights)
    for name in (A, LINEAR):
        owner = name if name == A else name.removesuffix(".weight")
        rows = np.array(weights[name].T if name == A else weights[name], np.float64)
        scales = np.repeat(np.array(tensors[f"{owner}.scales"], np.float64), 32, axis=1)
        biases = np.repeat(np.array(tensors[f"{owner}.biases"], np.float64), 32, axis=1)
        stream = np.array(tensors[f"{owner}.weight"]).view(np.uint8)
        flags = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(rows), -1, bits)
        codes = (flags * 2 ** np.arange(bits)).sum(-1)
        exact = (codes * scales + biases).astype(np.float32).astype(np.float16)
        value = np.array(found[name].T if name == A else found[name])
        assert value.dtype == np.float16 and np.array_equal(value, exact)
        assert np.all(np.abs(value - rows) <= 1.01 * np.abs(scales) + 1e-3)


def test_small_tensors_and_those_that_no_group_divides_stay_as_they_are():
    config, weights = adapter(bits=4, sampler_bits=8)
    weights[A] = weights[A][:40]
    tensors = to_file(weights, config)
    packed = [name for name, value in tensors.items() if value.dtype == mx.uint32]
    kept = [name for name in weights if name in tensors and name not in packed]
    assert LINEAR in packed and A in kept and B not in kept
    narrow = [name for name in weights if ".k_proj.lora_b" in name]  # [r, 16]
    assert set(narrow) <= set(kept)
    assert "mask_embeddings" in kept and "sampler_head.linear_1.bias" in kept
    assert all(mx.array_equal(tensors[name], weights[name].astype(mx.float16)) for name in kept)


def test_experts_are_packed_one_by_one():
    config, _ = adapter(bits=4)
    value = mx.random.normal((3, 64, 4), key=mx.random.key(1))
    together = from_file(to_file({A: value}, config), config)[A]
    assert together.shape == value.shape
    for index in range(3):
        alone = from_file(to_file({A: value[index]}, config), config)[A]
        assert mx.array_equal(together[index], alone)


def test_zeros_stay_zeros():
    config, _ = adapter(bits=4)
    assert not from_file(to_file({B: mx.zeros((4, 32))}, config), config)[B].any()


def test_rounded_weights_are_the_loaded_ones(tmp_path):
    config, weights = adapter(bits=3, sampler_bits=8)
    save_adapter(tmp_path, config, weights)
    _, loaded = read_adapter(tmp_path)
    found = rounded(weights, config)
    assert set(found) == set(loaded) == set(weights)
    for name, value in found.items():
        assert value.dtype == mx.float32
        assert mx.array_equal(value, loaded[name].astype(mx.float32))
    assert is_quantised(config) and not is_quantised(config.as_plain())


def test_a_model_computes_with_the_restored_weights(tmp_path):
    options: dict[str, Any] = {"vocab_size": BYTE_VOCAB, "eos_token_id": EOS}
    base = save_tiny_model(tmp_path / "model", "llama", **options)
    config, weights = random_adapter(tiny_base("llama", **options))
    config = dataclasses.replace(config, bits=8, sampler_bits=4, group_size=32)
    save_adapter(tmp_path / "adapter", config, weights)
    model, _ = load(str(base), adapter_path=str(tmp_path / "adapter"))
    layer = model.base.model.layers[0].mlp.down_proj
    expected = rounded(weights, config)
    assert mx.array_equal(layer.lora_a, expected[A]) and mx.array_equal(layer.lora_b, expected[B])
    assert model.sampler_head is not None
    assert mx.array_equal(model.sampler_head.linear_1.weight, expected[LINEAR])
    assert model.adapter_config == config


def test_the_size_is_known_before_the_file_is_written(tmp_path):
    for changes in ({}, {"bits": 4}, {"bits": 3, "sampler_bits": 8}):
        config, weights = adapter(**changes)
        save_adapter(tmp_path, config, weights)
        shapes = {name: value.shape for name, value in weights.items()}
        assert adapter_file_bytes(shapes, config) == (tmp_path / WEIGHTS_FILE).stat().st_size


def llama_8b(**changes: object) -> tuple[dict[str, tuple[int, ...]], MTPConfig]:
    """Shapes of an adapter of rank 32 for Llama-3.1-8B, as its ``config.json`` has the sizes."""
    dims, keys, inner, layers, rank, k = 4096, 1024, 14336, 32, 32, 8
    linears = {"self_attn.q_proj": (dims, dims), "self_attn.k_proj": (dims, keys)}
    linears |= {"self_attn.v_proj": (dims, keys), "self_attn.o_proj": (dims, dims)}
    linears |= {"mlp.gate_proj": (dims, inner), "mlp.up_proj": (dims, inner)}
    linears |= {"mlp.down_proj": (inner, dims)}
    shapes: dict[str, tuple[int, ...]] = {"mask_embeddings": (k, dims)}
    for layer in range(layers):
        for name, (a, b) in linears.items():
            path = f"model.layers.{layer}.{name}"
            shapes |= {f"{path}.lora_a": (a, rank), f"{path}.lora_b": (rank, b)}
    for index, width in ((1, 2 * dims), (2, dims)):
        shapes |= {f"sampler_head.linear_{index}.weight": (dims, width)}
        shapes |= {f"sampler_head.linear_{index}.bias": (dims,)}
        shapes |= {f"sampler_head.norm_{index}.{part}": (dims,) for part in ("weight", "bias")}
    config, _ = random_adapter(tiny_base("llama"))
    return shapes, dataclasses.replace(config, rank=rank, num_draft_tokens=k, **changes)


@pytest.mark.parametrize(("bits", "megabytes"), [(0, 268.6), (8, 142.9), (4, 75.8), (3, 59.0)])
def test_sizes_for_an_8b_model(bits, megabytes):
    shapes, config = llama_8b(bits=bits, sampler_bits=bits)
    assert adapter_file_bytes(shapes, config) / 1e6 == pytest.approx(megabytes, abs=0.05)


def broken(tensors: dict[str, mx.array], how: str) -> dict[str, mx.array]:
    tensors = dict(tensors)
    match how:
        case "no scales":
            del tensors[f"{A}.scales"]
        case "no biases":
            del tensors[f"{A}.biases"]
        case "too short":
            tensors[f"{A}.weight"] = tensors[f"{A}.weight"][:, 1:]
        case "floats":
            tensors[f"{A}.weight"] = tensors[f"{A}.weight"].astype(mx.float32)
        case "a vector":
            for part in ("weight", "scales", "biases"):
                tensors[f"{A}.{part}"] = tensors[f"{A}.{part}"][0]
        case "infinite":
            tensors[f"{A}.scales"] = tensors[f"{A}.scales"] * mx.inf
        case "unknown":
            tensors["mask_embeddings.scales"] = mx.zeros((1, 1))
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no scales", "lora_a.weight is quantised, but has no scales"),
        ("no biases", "lora_a lacks one of weight, scales, biases"),
        ("too short", "lora_a is not packed in 4 bits and groups of 32"),
        ("floats", "lora_a is not packed"),
        ("a vector", "lora_a is not packed"),
        ("infinite", "lora_a has NaN or infinite values"),
        ("unknown", "mask_embeddings.weight lacks one of"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, how, message):
    config, weights = adapter(bits=4)
    save_adapter(tmp_path, config, weights)
    tensors = broken(cast(Any, mx.load(str(tmp_path / WEIGHTS_FILE))), how)
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_adapter(tmp_path)
    assert WEIGHTS_FILE in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_other_bits_than_the_configuration_is_refused(tmp_path):
    config, weights = adapter(bits=4)
    tensors = to_file(weights, config)
    for changes in ({"bits": 8}, {"bits": 0}, {"group_size": 64}):
        with pytest.raises(ValueError, match="lora_. is"):
            from_file(tensors, dataclasses.replace(config, **changes))


def test_an_overflow_is_refused_before_anything_is_written(tmp_path):
    config, weights = adapter(bits=4)
    weights[B] = weights[B] * 1e6
    with pytest.raises(ValueError, match="lora_b contains values that F16 cannot represent"):
        save_adapter(tmp_path / "out", config, weights)
    assert not (tmp_path / "out").exists()


def test_the_configuration_of_a_plain_adapter_has_no_new_keys(tmp_path):
    config, weights = random_adapter(tiny_base("llama"))
    save_adapter(tmp_path, config, weights)
    text = (tmp_path / CONFIG_FILE).read_text()
    assert not any(key in text for key in ("bits", "group_size", "adapter_kind", "vera"))
    quantised = dataclasses.replace(config, bits=4)
    save_adapter(tmp_path, quantised, weights)
    assert read_config(tmp_path) == quantised
    assert read_config(tmp_path).as_plain() == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"sampler_bits": 1}, "sampler_bits must be one of"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"adapter_kind": "dora"}, "adapter_kind must be one of lora, vera, got 'dora'"),
        ({"adapter_kind": "vera"}, "vera_dims and target_modules differ in down_proj"),
    ],
)
def test_values_that_no_file_has_are_refused(changes, message):
    config, _ = random_adapter(tiny_base("llama"))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)
