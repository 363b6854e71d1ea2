"""Folders of base models, damaged, split, as PyTorch files, and what conversions make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from mlx_lm import utils as lm_utils
from mlx_lm.convert import convert as mlx_lm_convert

from mlx_mtp.converters.base.model import BaseResult, convert_base
from mlx_mtp.storage.safetensors import check_safetensors
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB

IDS = [[5, 1, 77, 30, 2, 9, 9, 200]]
TRANSFORMERS = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
}


def convert(source: Path | str, tmp_path: Path, **options: Any) -> tuple[Path, BaseResult]:
    """Convert into ``tmp_path/work/out``; nothing else may stay in ``work``."""
    output = tmp_path / "work" / "out"
    output.mkdir(parents=True)
    result = convert_base(str(source), output, **options)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    return output, result


def refusal(source: Path | str, tmp_path: Path, **options: Any) -> str:
    """The one line with which a model is refused; nothing may be left behind."""
    output = tmp_path / "work" / "out"
    output.mkdir(parents=True)
    with pytest.raises(ValueError) as caught:
        convert_base(str(source), output, **options)
    assert "\n" not in str(caught.value) and str(caught.value)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert not any(output.iterdir())
    return str(caught.value)


def by_mlx_lm(source: Path, tmp_path: Path, **options: Any) -> Path:
    """mlx-lm's own conversion of the folder."""
    output = tmp_path / "mlx-lm"
    mlx_lm_convert(str(source), str(output), **options)
    return output


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a model folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        check_safetensors(path)
        found |= mx.load(str(path))  # type: ignore[arg-type]
    return found


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """The same tensors, types and bits."""
    mine, other = tensors(ours), tensors(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert value.dtype == other[name].dtype, name
        assert mx.array_equal(value, other[name]).item(), name


def logits(folder: Path) -> mx.array:
    """What mlx-lm computes with a model folder."""
    model: Any = lm_utils.load_model(folder)[0]
    return model(mx.array(IDS))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def split(folder: Path, *, parts: int = 3) -> None:
    """Distribute a folder's tensors over shards with an index."""
    found = sorted(tensors(folder).items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        shard = dict(found[number::parts])
        mx.save_safetensors(str(folder / name), shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def torch_files(folder: Path, *, parts: int) -> None:
    """Replace a folder's safetensors by PyTorch files."""
    found = tensors(folder)
    state = {}
    for name, value in found.items():
        wide: Any = value.astype(mx.float32)
        kind = {mx.float16: torch.float16, mx.bfloat16: torch.bfloat16}.get(value.dtype)
        state[name] = torch.tensor(memoryview(wide).tolist()).to(kind or torch.float32)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(parts):
        name = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        shard = dict(sorted(state.items())[number::parts])
        torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)


def by_transformers(folder: Path, kind: str, **options: Any) -> Path:
    """A model folder as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=BYTE_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **TRANSFORMERS[kind],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    byte_tokenizer()._tokenizer.save_pretrained(folder)
    return folder
