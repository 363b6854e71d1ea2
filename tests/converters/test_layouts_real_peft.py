"""Checkpoints that real PEFT writes, in every way in which it comes to save mask rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlx_mtp.converters.checkpoint import read_checkpoint
from mlx_mtp.converters.layouts import BaseFacts, convert_layout, describe

VARIANTS: dict[str, dict[str, Any]] = {
    "list": {"trainable_token_indices": [61, 62, 63, 60]},
    "dict": {"trainable_token_indices": {"embed_tokens": [61, 62, 63, 60]}},
    "path": {"trainable_token_indices": {"model.embed_tokens": [60, 61, 62, 63]}},
    "tied": {"trainable_token_indices": [60, 61, 62, 63], "ensure_weight_tying": True},
    "whole": {"modules_to_save": ["embed_tokens"]},
    "whole tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "whole both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"modules_to_save": ["lm_head"], "trainable_token_indices": [60, 61, 62, 63]},
    "rslora": {"trainable_token_indices": [60, 61, 62, 63], "use_rslora": True},
    "patterns": {
        "trainable_token_indices": [60, 61, 62, 63],
        "rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 3},
        "alpha_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 1},
        "use_rslora": True,
    },
    "eva": {  # as the example of pull request 3541 with --eva_init, which distributes ranks
        "trainable_token_indices": [60, 61, 62, 63],
        "use_rslora": True,
        "ensure_weight_tying": True,
        "init_lora_weights": "eva",
        "eva_config": EvaConfig(rho=2.0),
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 7},
    },
}
ORDER = [63, 60, 62, 61]


def torch_base(folder: Path, *, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def torch_facts(model: Any) -> BaseFacts:
    """The facts of a transformers model, before PEFT wraps it."""
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    tied = bool(model.config.tie_word_embeddings)
    if tied:
        del linears["lm_head"]

    def rows(table: torch.Tensor) -> Any:
        copy = mx.array(table.detach().numpy())
        return lambda ids: copy[mx.array(list(ids))]

    return BaseFacts(
        name="torch",
        model_type="llama",
        hidden_size=16,
        num_layers=2,
        vocab_size=model.config.vocab_size,
        norm_eps=1e-6,
        num_tokens=None,
        linears=linears,
        embed=rows(model.get_input_embeddings().weight),
        unembed=None if tied else rows(model.get_output_embeddings().weight),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_what_real_peft_writes(tmp_path: Path, tied: bool, resized: bool, variant: str) -> None:
    model = torch_base(tmp_path / "base", tied=tied)
    if not resized:  # the base model has spare rows
        model.resize_token_embeddings(64)
        model.save_pretrained(tmp_path / "base")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base = torch_facts(model)
    if resized:
        model.resize_token_embeddings(64)
    settings = {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM", "alora_invocation_tokens": ORDER, **VARIANTS[variant],
    }  # fmt: skip
    live: Any = get_peft_model(model, LoraConfig(**settings))
    masks = train(live, whole="trainable_token_indices" not in settings)
    live.save_pretrained(str(tmp_path / "out"))
    read = read_checkpoint(tmp_path / "out")
    assert describe(read).problems == ()
    found = convert_layout(read, base)
    assert found.layout == "peft-mtp"
    assert np.array_equal(np.array(found.tensors["mask_embeddings"]), masks[ORDER].numpy())
    for name, module in live.get_base_model().named_modules():
        if name.endswith(("q_proj", "down_proj")):
            a, b = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            assert np.array_equal(np.array(found.tensors[f"{name}.lora_a"]), a.detach().numpy().T)
            assert np.array_equal(np.array(found.tensors[f"{name}.lora_b"]), b.detach().numpy().T)
            assert found.rank_pattern.get(name, found.rank) == module.r["default"]
            assert found.scale_pattern.get(name, found.scale) == module.scaling["default"]


@torch.no_grad()
def train(live: Any, *, whole: bool) -> torch.Tensor:
    """Give random values to whatever training would change; returns the embedding table."""
    generator = torch.Generator().manual_seed(1)
    for name, value in live.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            value.copy_(torch.randn(value.shape, generator=generator))
    table = live.get_base_model().get_input_embeddings()
    if whole:
        chosen = getattr(table, "modules_to_save", {"default": table})["default"].weight
        chosen[60:64] = torch.randn((4, 16), generator=generator)
        return chosen.clone()
    rows = table.token_adapter.base_layer.weight.clone()
    adapter = table.token_adapter
    rows[adapter.token_indices["default"]] = adapter.trainable_tokens_delta["default"]
    return rows


@pytest.mark.filterwarnings("ignore")
def test_tables_saved_on_request(tmp_path: Path) -> None:
    model = torch_base(tmp_path / "base", tied=True)
    base = torch_facts(model)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 1])
    live: Any = get_peft_model(model, config)
    train(live, whole=False)
    live.save_pretrained(str(tmp_path / "out"), save_embedding_layers=True)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 8
    read = read_checkpoint(tmp_path / "out")
    with pytest.raises(ValueError, match=r"\[3, 1\] may be mask tokens .* mask_token_ids=3,1"):
        convert_layout(read, base)
    assert convert_layout(read, base, options={"mask_token_ids": "1,3"}).num_draft_tokens == 2
