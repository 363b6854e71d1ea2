"""Raw state dicts with a frozen base model in them, as files, and what ``describe`` says."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlx_mtp.converters.checkpoint import read_checkpoint
from mlx_mtp.converters.layouts import convert_layout, describe
from tests.converters import layout_samples as samples
from tests.converters.layout_samples import (
    ADAPTED,
    DIMS,
    PATHS,
    RANK,
    TABLE,
    VOCAB,
    checkpoint,
    facts,
    state_tensors,
)
from tests.converters.layout_samples import state_expected as expected
from tests.converters.layout_samples import state_read as read


class TestFrozenBase:
    def frozen(self, prefix: str = "") -> dict[str, mx.array]:
        tensors = {
            f"{prefix}model.embed_tokens.weight": mx.array(TABLE),
            f"{prefix}lm_head.weight": mx.array(TABLE),
            f"{prefix}model.norm.weight": mx.ones(DIMS),
            f"{prefix}model.layers.0.input_layernorm.weight": mx.ones(DIMS),
            f"{prefix}model.layers.0.self_attn.q_norm.weight": mx.ones(4),
            f"{prefix}model.rotary_emb.inv_freq": mx.ones(2),
            f"{prefix}model.layers.0.self_attn.v_proj.bias": mx.ones(4),
        }
        for path, (in_dims, out_dims) in PATHS.items():
            inner = ".base_layer" if path in ADAPTED else ""
            tensors[f"{prefix}{path}{inner}.weight"] = mx.zeros((out_dims, in_dims))
        return tensors

    @pytest.mark.parametrize("prefix", ["", "model.", "state_dict._orig_mod."])
    def test_left_out(self, prefix: str) -> None:
        source = state_tensors(prefix="lora.") | self.frozen(prefix)
        found = convert_layout(read(source), facts())
        assert samples.same(found.tensors, expected())
        assert (
            "21 tensors of the frozen base model were omitted; only its embedding was compared"
        ) in found.notes

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            (
                "model.embed_tokens.weight",
                mx.zeros((VOCAB, DIMS)),
                "row 0 differs from that of tiny",
            ),
            ("lm_head.weight", mx.zeros((VOCAB, DIMS)), "row 0 differs from that of tiny"),
            ("lm_head.weight", mx.zeros((VOCAB, 4)), "not rows of 8 numbers"),
            (
                "model.layers.0.mlp.up_proj.weight",
                mx.zeros((DIMS, 12)),
                "is unknown and not part of",
            ),
            ("model.layers.0.gate.weight", mx.zeros((4, 4)), "is unknown and not part of tiny"),
            ("draft.layers.0.self_attn.q_proj.weight", mx.zeros((8, 8)), "draft.* is unknown"),
            ("model.mtp.weight", mx.zeros((8, 8)), "tensor model.mtp.weight is unknown"),
            ("loss.scale", mx.array(1.0), "tensor loss.scale is unknown"),
            (f"{ADAPTED[0]}.lora_magnitude_vector", mx.ones(4), "lora_magnitude_vector is unknown"),
        ],
    )
    def test_refused(self, name: str, tensor: mx.array, message: str) -> None:
        source = state_tensors() | self.frozen() | {name: tensor}
        with pytest.raises(ValueError, match=message):
            convert_layout(read(source), facts())

    def test_the_state_of_the_training_is_left_out(self) -> None:
        source = state_tensors(prefix="model.") | {"optimizer.state.0.exp_avg": mx.zeros(3)}
        assert samples.same(convert_layout(read(source), facts()).tensors, expected())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_torch(tmp_path: Path, forked: None, suffix: str) -> None:
    source = {
        name: torch.tensor(np.array(value)).to(torch.bfloat16)
        for name, value in state_tensors(prefix="module.").items()
    }
    path = tmp_path / f"mtp{suffix}"
    if suffix == ".pt":
        torch.save({"model": source, "args": {"alpha": 6, "rank": RANK}}, path)
    else:
        save_file(source, path)
        (tmp_path / "config.json").write_text('{"alpha": 6, "rank": 4}')
    found = convert_layout(read_checkpoint(path, allow_pickle=True), facts())
    wanted = {name: value.astype(mx.bfloat16) for name, value in expected().items()}
    assert samples.same(found.tensors, wanted)
    assert found.scale == 1.5


def test_peft_s_own_state_dict(tmp_path: Path, forked: None) -> None:
    """Saved with ``torch.save(model.state_dict())`` instead of ``save_pretrained``."""
    prefix = "base_model.model."
    leaf = "lora_A.default.weight lora_B.default.weight"
    source = state_tensors(prefix=prefix, leaf=leaf) | TestFrozenBase().frozen(prefix)
    path = tmp_path / "whole.pth"
    torch.save({name: torch.tensor(np.array(value)) for name, value in source.items()}, path)
    given = {"alpha": "6", "residual": "hidden"}
    found = convert_layout(read_checkpoint(path, allow_pickle=True), facts(), options=given)
    assert samples.same(found.tensors, expected())


def test_an_adapter_of_mlx_lm() -> None:
    """Plain LoRA in mlx-lm's own order can serve as drafting weights too."""
    source = state_tensors(leaf="lora_a lora_b", flip_a=True, flip_b=True, masks=None, sampler=())
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 20.0}}
    given = {"num_draft_tokens": "2", "seed": "0"}
    found = convert_layout(checkpoint(source, config=config), facts(), options=given)
    assert found.scale == 20.0
    wanted = {name: value for name, value in expected().items() if ".lora_" in name}
    del found.tensors["mask_embeddings"]
    assert samples.same(found.tensors, wanted)


def test_description() -> None:
    summary = describe(read(state_tensors(norm_bias=False), alpha=8, model_name="someone/tiny"))
    assert (summary.layout, summary.base_model) == ("state-dict", "someone/tiny")
    assert (summary.num_draft_tokens, summary.rank, summary.scale) == (5, RANK, 2.0)
    assert summary.targets == ("down_proj", "v_proj")
    assert summary.sampler == "mlp, RMSNorm"
    assert summary.problems == ()


def test_description_of_a_poor_one() -> None:
    source = state_tensors() | {"gate": mx.zeros(3), "sampler.gate": mx.zeros(3)}
    summary = describe(checkpoint(source))
    assert summary.sampler is None
    assert summary.problems == (
        "tensor gate is unknown",
        "tensor sampler.gate is unknown: the sampler's end in .weight and .bias",
        "the checkpoint contains neither alpha nor scale: specify one as a layout option",
    )
