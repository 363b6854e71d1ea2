"""Smaller adapters from trained ones: the nearest low-rank products, and quantised weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.lab.adapter_sizes import main as adapter_sizes
from mlx_mtp.lab.adapter_sizes import parse_variant, use
from mlx_mtp.loading import load, read_adapter
from mlx_mtp.model.config import WEIGHTS_FILE, MTPConfig
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.compress import Compression, compress, save_compressed, shortened
from tests.helpers.tiny import (
    random_adapter,
    random_heads,
    save_adapter,
    save_tiny_pair,
    tiny_base,
    tiny_mtp,
)


def factors(*shape: int, rank: int = 6, out: int = 16, seed: int = 0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((*shape, rank)), rng.standard_normal((*shape[:-1], rank, out))
    return mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32))


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_a_lower_rank_is_the_nearest_product(rank):
    a, b = factors(24)
    full = np.array(a, np.float64) @ np.array(b, np.float64)
    values = np.linalg.svd(full, compute_uv=False)
    low_a, low_b = shortened(a, b, max_rank=rank)
    assert low_a.shape == (24, min(rank, 6)) and low_b.shape == (min(rank, 6), 16)
    error = np.linalg.norm(full - np.array(low_a) @ np.array(low_b))
    assert error == pytest.approx(np.sqrt((values[rank:6] ** 2).sum()), rel=1e-4, abs=1e-4)
    norms = np.linalg.norm(low_a, axis=0), np.linalg.norm(low_b, axis=1)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # neither side is small


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95, 1.0])
def test_energy_keeps_the_smallest_rank_that_has_it(energy):
    a, b = factors(24)
    squares = np.linalg.svd(np.array(a) @ np.array(b), compute_uv=False)[:6] ** 2
    rank = shortened(a, b, energy=energy)[0].shape[-1]
    shares = np.cumsum(squares) / squares.sum()
    assert shares[rank - 1] >= energy - 1e-6 and (rank == 1 or shares[rank - 2] < energy)


def test_ranks_that_are_not_needed_go(tmp_path):
    a, b = factors(24, rank=2)
    wide = mx.concatenate([a, a], axis=1), mx.concatenate([b, -0.5 * b])
    assert shortened(*wide, energy=1 - 1e-6)[0].shape[-1] == 2
    zeros = shortened(a, mx.zeros_like(b), energy=0.5)
    assert not (zeros[0] @ zeros[1]).any()


def test_experts_are_shortened_together():
    a, b = factors(3, 24)
    low_a, low_b = shortened(a, b, max_rank=2)
    assert low_a.shape == (3, 24, 2) and low_b.shape == (3, 2, 16)
    for index in range(3):
        alone = shortened(a[index], b[index], max_rank=2)
        assert mx.allclose(low_a[index] @ low_b[index], alone[0] @ alone[1], atol=1e-4)


def test_nothing_to_do_changes_nothing():
    config, weights = random_adapter(tiny_base("llama"))
    made, tensors = compress(config, weights, Compression())
    assert made == config and tensors == weights
    assert Compression().words() == "none"


def test_layers_get_the_ranks_that_they_need(tmp_path):
    config, weights = random_adapter(tiny_base("llama"))
    path = "model.layers.0.mlp.up_proj"
    a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
    weights |= {f"{path}.lora_a": a * mx.array([1.0, 0, 0, 0]), f"{path}.lora_b": b}
    source = save_adapter(tmp_path / "in", config, weights)
    made = save_compressed(source, tmp_path / "out", Compression(energy=0.999, max_rank=3))
    assert made.rank == 3 and made.rank_pattern == {path: 1}
    model = MTPModel(tiny_base("llama"), config=made, weights=read_adapter(tmp_path / "out")[1])
    assert model.adapter_config == made
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rank at most 3, 0.999 of the energy of each layer" in card


def test_the_command_writes_a_smaller_adapter_that_loads(tmp_path):
    model, adapter = save_tiny_pair(tmp_path)
    out = tmp_path / "small"
    words = ["compress", str(adapter), "--adapter-path", str(out), "--adapter-bits", "4"]
    words += ["--sampler-bits", "8", "--adapter-group-size", "32", "--max-rank", "2"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    sizes = [(folder / WEIGHTS_FILE).stat().st_size for folder in (adapter, out)]
    assert sizes[1] < sizes[0] and f"{sizes[1] / 1e3:.1f} kB, from" in result.output
    config = load(str(model), adapter_path=str(out))[0].adapter_config
    assert isinstance(config, MTPConfig)
    assert (config.bits, config.sampler_bits, config.group_size, config.rank) == (4, 8, 32, 2)
    inspected = CliRunner().invoke(cli, ["inspect", str(out)])
    assert "4 bits, sampler head 8 bits, groups of 32" in inspected.output
    card = (out / "README.md").read_text()
    assert "4 bits" in card and f"{sizes[1] / 1e3:.1f} kB" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter-bits", "7"], "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        (["--adapter-bits", "4", "--adapter-group-size", "48"], "group_size must be one of"),
        (["--max-rank", "0"], "max_rank must be at least 1, got 0"),
        (["--energy", "0"], "energy must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, words, message):
    folder = save_adapter(tmp_path / "in", *random_adapter(tiny_base("llama")))
    command = ["compress", str(folder), "--adapter-path", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_heads_and_existing_folders_are_refused(tmp_path):
    heads = save_adapter(tmp_path / "heads", *random_heads(tiny_base("llama")))
    with pytest.raises(ValueError, match="has heads: only adapters of mask tokens"):
        save_compressed(heads, tmp_path / "out", Compression(bits=4))
    with pytest.raises(ValueError, match="already exists"):
        save_compressed(heads, heads, Compression(bits=4))


def test_variants_of_the_table():
    assert parse_variant("16/16") == Compression(sampler_bits=0)
    assert parse_variant("4/8g32r16e0.9") == Compression(
        bits=4, sampler_bits=8, group_size=32, max_rank=16, energy=0.9
    )
    with pytest.raises(ValueError, match="variant '4' must be BITS/BITS"):
        parse_variant("4")


def test_a_model_of_the_table_computes_as_one_that_loads_the_file(tmp_path):
    config, weights = random_adapter(tiny_base("llama"))
    model = tiny_mtp("llama")
    how = Compression(bits=4, sampler_bits=8, group_size=32, max_rank=2)
    made, tensors = compress(config, weights, how)
    use(model, made, tensors)
    source = save_adapter(tmp_path / "in", config, weights)
    save_compressed(source, tmp_path / "out", how)
    loaded = read_adapter(tmp_path / "out")
    other = MTPModel(tiny_base("llama"), config=loaded[0], weights=loaded[1])
    for layer, copy in zip(model.base.layers, other.base.layers, strict=True):
        assert mx.array_equal(layer.mlp.up_proj.lora_a, copy.mlp.up_proj.lora_a)
        assert mx.array_equal(layer.mlp.up_proj.lora_b, copy.mlp.up_proj.lora_b)
    assert model.sampler_head is not None and other.sampler_head is not None
    assert mx.array_equal(model.sampler_head.linear_2.weight, other.sampler_head.linear_2.weight)


def test_the_table_has_a_row_per_variant(tmp_path):
    model, adapter = save_tiny_pair(tmp_path)
    words = ["--model", str(model), "--adapter-path", str(adapter), "--every", "24"]
    words += ["--max-tokens", "6", "--variants", "16/16,4/8g32,16/16r1"]
    result = CliRunner().invoke(adapter_sizes, words)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("16/16 ", "4/8g32 ", "16/16r1 "))
    assert '"difference": 0.0' in result.output


def test_dataclass_is_checked():
    with pytest.raises(ValueError, match="energy"):
        dataclasses.replace(Compression(), energy=1.5)
    assert Path(WEIGHTS_FILE).suffix == ".safetensors"
