"""Vocabularies enlarged, padded or cut by real PyTorch: masks are asked for, then verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mlx_mtp.cli.main import cli
from tests.converters import torch_modules as parts
from tests.converters.conversions import run
from tests.converters.torch_modules import DIMS, PADDED_VOCAB
from tests.helpers.fixtures_generate import VOCAB_SIZE

K = 3
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "enlarged": (VOCAB_SIZE, {"new_num_tokens": VOCAB_SIZE + K}),
    "enlarged and padded": (
        VOCAB_SIZE,
        {"new_num_tokens": VOCAB_SIZE + K, "pad_to_multiple_of": 64},
    ),
    "padding used": (PADDED_VOCAB, {}),
    "padding cut": (PADDED_VOCAB, {"new_num_tokens": VOCAB_SIZE + K}),
    "padding enlarged": (PADDED_VOCAB, {"pad_to_multiple_of": 64}),
}
MASKS = list(range(VOCAB_SIZE, VOCAB_SIZE + K))


def resized(root: Path, size: str, *, tied: bool, kind: str = "llama") -> tuple[Path, Any]:
    """A saved base model, and the model with the new size and random rows for mask tokens."""
    rows, settings = SIZES[size]
    live = parts.tiny_causal_lm(kind, tied=tied, vocab_size=rows)
    base = parts.save_model(live, root / "base")
    live = parts.load_model(base)
    if settings:
        live.resize_token_embeddings(**settings)
    with torch.no_grad():
        table: Any = live.get_input_embeddings().weight
        table[MASKS] = torch.randn(K, DIMS, generator=torch.Generator().manual_seed(4))
    return base, live


def by_peft(root: Path, live: Any, **lora: Any) -> Path:
    """A PEFT checkpoint with whole tables and nothing that names its mask tokens."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **lora
    )
    model = peft.get_peft_model(live, config).eval()
    parts.randomise(model, seed=3, only=("lora_", "trainable_tokens_delta"))
    model.save_pretrained(str(root / "peft"), save_embedding_layers=True)
    return root / "peft"


def by_hand(root: Path, live: Any) -> Path:
    """The state dict of the whole model with bare low-rank weights."""
    tensors = {name: value.clone() for name, value in live.state_dict().items()}
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        path = name.removesuffix(".weight")
        tensors[f"{path}.lora_A"] = torch.randn(4, DIMS, generator=torch.Generator().manual_seed(1))
        tensors[f"{path}.lora_B"] = torch.randn(
            tensors[name].shape[0], 4, generator=torch.Generator().manual_seed(2)
        )
        tensors[f"{path}.alpha"] = torch.tensor(8.0)
    (root / "hand").mkdir()
    save_file(tensors, root / "hand" / "all.safetensors")
    return root / "hand"


def convert(base: Path, checkpoint: Path, *options: str) -> list[str]:
    output = base.parent / "bundle"
    paths = ["--hf-path", str(base), "--mtp-path", str(checkpoint), "--mlx-path", str(output)]
    return ["convert", *paths, "--verify", *options]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [by_peft, by_hand])
def test_mask_rows_are_asked_for_and_then_proved(
    tmp_path: Path, size: str, tied: bool, make: Any
) -> None:
    base, live = resized(tmp_path, size, tied=tied)
    checkpoint = make(tmp_path, live)
    refused = CliRunner().invoke(cli, convert(base, checkpoint))
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    option = "--checkpoint-option mask_token_ids="
    assert option in refused.stderr and not (tmp_path / "bundle").exists()
    if size == "enlarged":  # the ids that it names are the right ones
        assert f"{option}{','.join(map(str, MASKS))}\n" in refused.stderr
    ids = f"mask_token_ids={','.join(map(str, MASKS))}"
    printed = run(*convert(base, checkpoint, "--checkpoint-option", ids))
    assert "mask rows" in printed and "the same as PyTorch" in printed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("lora", [{}, {"trainable_token_indices": MASKS}])
def test_tokens_named_as_masks_need_no_option(tmp_path: Path, first: int, lora: Any) -> None:
    base, live = resized(tmp_path, "enlarged and padded", tied=True)
    checkpoint = by_peft(tmp_path, live, **lora)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    names = [f"<mask_{first + index}>" for index in range(K)]
    tokenizer.add_special_tokens({"additional_special_tokens": names[::-1]})
    assert sorted(tokenizer.convert_tokens_to_ids(names)) == MASKS
    tokenizer.save_pretrained(checkpoint)
    printed = run(*convert(base, checkpoint))
    assert "the same as PyTorch" in printed and f"k {K}" in printed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["qwen3", "phi3"])
@pytest.mark.parametrize("size", ["enlarged and padded", "padding cut"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_model_alone(tmp_path: Path, kind: str, size: str, tied: bool) -> None:
    _, live = resized(tmp_path, size, tied=tied, kind=kind)
    base = parts.save_model(live, tmp_path / "resized")
    arguments = ["--hf-path", str(base), "--mlx-path", str(tmp_path / "out"), "--verify"]
    assert "the same as PyTorch" in run("convert", *arguments)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_that_stands_in_the_file(tmp_path: Path) -> None:
    base, _ = resized(tmp_path, "enlarged", tied=True)
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    arguments = ["--hf-path", str(base), "--mlx-path", str(tmp_path / "out"), "--verify"]
    assert "the same as PyTorch" in run("convert", *arguments)
