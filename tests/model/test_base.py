"""The weights of a folder, in the forms in which other libraries write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.converters.base.model import convert_base
from mlx_mtp.loading import load, read_tensors
from tests.helpers.tiny import save_tiny_model

Tensors = dict[str, mx.array]
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"


def _save(path: Path, tensors: Tensors) -> None:
    mx.save_safetensors(str(path), tensors, {"format": "pt"})


def _add_frequencies(folder: Path, tensors: Tensors) -> None:
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    _save(folder / "model.safetensors", tensors | dict.fromkeys(names, mx.ones(4)))


def _remove_prefix(folder: Path, tensors: Tensors) -> None:
    _save(folder / "model.safetensors", {k.removeprefix("model."): v for k, v in tensors.items()})


def _split(folder: Path, tensors: Tensors, *, keep: bool = False) -> None:
    names = sorted(tensors)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    for file, part in parts.items():
        _save(folder / file, {name: tensors[name] for name in part})
    where = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    if not keep:
        (folder / "model.safetensors").unlink()


def _outdated_shards(folder: Path, tensors: Tensors) -> None:
    _split(folder, {name: value * 0 for name, value in tensors.items()}, keep=True)


def _outdated_index(folder: Path, tensors: Tensors) -> None:
    _outdated_shards(folder, tensors)
    (folder / FIRST).unlink()


def _unlisted_file(folder: Path, tensors: Tensors) -> None:
    _split(folder, tensors)
    _save(folder / "model-older.safetensors", {k: v * 0 for k, v in tensors.items()})


def _logits(folder: Path) -> mx.array:
    model: Any = load(str(folder), mtp=False, kernels=False)[0]
    return model.base(mx.array([[1, 2, 3]]))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "change",
    [_add_frequencies, _remove_prefix, _split, _outdated_shards, _outdated_index, _unlisted_file],
)
def test_weights_mean_the_same_to_load_and_convert(
    tmp_path: Path, kind: str, change: Callable[[Path, Tensors], None]
) -> None:
    folder = save_tiny_model(tmp_path / "model", kind)
    expected = _logits(folder)
    tensors = read_tensors(folder / "model.safetensors")
    change(folder, tensors)
    assert mx.array_equal(_logits(folder), expected).item()
    output = tmp_path / "converted"
    output.mkdir()
    convert_base(str(folder), output)
    assert mx.array_equal(_logits(output), expected).item()


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    folder = save_tiny_model(tmp_path / "model")
    _split(folder, read_tensors(folder / "model.safetensors"))
    (folder / SECOND).unlink()
    if not index:
        (folder / INDEX).unlink()
    for use in (lambda: load(str(folder), mtp=False), lambda: convert_base(str(folder), tmp_path)):
        with pytest.raises(ValueError, match=f"{SECOND} is missing") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    _save(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"Missing 1 parameters: model\.norm\.weight"):
        load(str(folder), mtp=False)
