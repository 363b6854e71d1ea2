"""The mean of adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.loading import load, read_adapter
from mlx_mtp.train.average import mean_adapter, save_mean
from mlx_mtp.train.run.checkpoint import TrainState, save_state
from tests.helpers.tiny import random_adapter, save_adapter, save_tiny_pair, tiny_base


def three(root: Path) -> list[Path]:
    base = tiny_base("llama")
    return [save_adapter(root / str(seed), *random_adapter(base, seed=seed)) for seed in (1, 2, 3)]


def test_is_that_of_each_number(tmp_path):
    folders = three(tmp_path)
    config, mean = mean_adapter(folders)
    each = [read_adapter(folder) for folder in folders]
    assert config == each[0][0] and set(mean) == set(each[0][1])
    for name, value in mean.items():
        wanted = np.mean([np.array(weights[name], np.float64) for _, weights in each], axis=0)
        assert value.dtype == mx.float32 and np.abs(np.array(value) - wanted).max() < 1e-6


def test_of_an_adapter_with_itself_is_that_adapter(tmp_path):
    folder = three(tmp_path)[0]
    for name, value in mean_adapter([folder, folder])[1].items():
        assert mx.array_equal(value, read_adapter(folder)[1][name])


def test_takes_the_state_of_a_run_too(tmp_path):
    folders = three(tmp_path)
    weights = [read_adapter(folder)[1] for folder in folders]
    tensors = {"parameters.base." + name: value * 2 for name, value in weights[1].items()}
    state = TrainState(step=7, tensors=tensors | {"optimizer.step": mx.array(7)}, values={})
    path = save_state(folders[1] / "training", state)
    _, mean = mean_adapter([folders[0], path])
    name = "mask_embeddings"
    wanted = (weights[0][name].astype(mx.float32) + 2 * weights[1][name].astype(mx.float32)) / 2
    assert mx.allclose(mean[name], wanted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="state-0000007 has no ema weights"):
        mean_adapter([folders[0], path / "ema"])
    (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="state-0000007 is damaged"):
        mean_adapter([folders[0], path])


def test_names_the_newest_or_the_averaged_weights_of_a_state(tmp_path):
    folder = three(tmp_path)[0]
    weights = {"base." + name: value for name, value in read_adapter(folder)[1].items()}
    tensors = {"parameters." + name: value for name, value in weights.items()}
    tensors |= {"ema." + name: 3 * value for name, value in weights.items()}
    path = save_state(folder / "training", TrainState(step=7, tensors=tensors, values={}))
    for name, factor in ((path, 1), (path / "raw", 1), (path / "ema", 3)):
        out = tmp_path / f"out-{factor}-{name.name}"
        words = ["average", str(name), "--adapter-path", str(out)]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        assert f"wrote {out}: {name} for " in result.output
        assert f"copy of | {name}" in (out / "README.md").read_text()
        for key, value in read_adapter(out)[1].items():
            wanted = factor * weights["base." + key].astype(mx.float32)
            assert mx.allclose(value, wanted, rtol=1e-3, atol=1e-4), key
    _, mean = mean_adapter([path, path / "ema"])
    assert mx.allclose(mean["mask_embeddings"], 2 * weights["base.mask_embeddings"], rtol=1e-3)


def test_a_state_that_is_not_there_is_named(tmp_path):
    words = ["average", str(tmp_path / "state-0000009" / "ema"), "--adapter-path", str(tmp_path)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and "state-0000009/ema does not exist" in result.output


def test_does_not_keep_what_one_of_them_was_measured_to_accept(tmp_path):
    config, weights = random_adapter(tiny_base("llama"))
    config = dataclasses.replace(config, acceptance=(0.5, 0.4, 0.3, 0.2))
    folders = [save_adapter(tmp_path / "a", config, weights), three(tmp_path)[0]]
    assert mean_adapter(folders)[0].acceptance == ()


def test_command_writes_an_adapter_that_drafts(tmp_path):
    model, adapter = save_tiny_pair(tmp_path)
    out = tmp_path / "out"
    words = ["average", str(adapter), str(adapter), "--adapter-path", str(out)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}: the mean of 2 adapters for tiny-llama" in result.output
    assert load(str(model), adapter_path=str(out))[0].num_draft_tokens == 4
    assert f"mean of | {adapter}, {adapter}" in (out / "README.md").read_text()


def test_refuses_what_is_not_alike(tmp_path):
    base, folders = tiny_base("llama"), three(tmp_path)
    wide = save_adapter(tmp_path / "wide", *random_adapter(base, rank=8))
    with pytest.raises(ValueError, match="wide has rank 8, but .*1 has rank 4|wide has rank 8"):
        mean_adapter([folders[0], wide])
    config, weights = random_adapter(base)
    less = dict(sorted(weights.items())[:-1])
    with pytest.raises(ValueError, match="is in only one of"):
        mean_adapter([folders[0], save_adapter(tmp_path / "less", config, less)])
    other = weights | {"mask_embeddings": mx.zeros((3, 32))}
    with pytest.raises(ValueError, match=r"mask_embeddings in .*odd has the shape \[3, 32\]"):
        mean_adapter([folders[0], save_adapter(tmp_path / "odd", config, other)])


def test_refuses_one_adapter_and_a_folder_that_is_there(tmp_path):
    folders = three(tmp_path)
    with pytest.raises(ValueError, match="at least two adapters, got 1"):
        save_mean(folders[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="2 already exists"):
        save_mean(folders, folders[1])
    assert not (tmp_path / "out").exists()
