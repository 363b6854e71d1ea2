"""MTP-GLoRA: fused projections split exactly, one shared mask, RMSNorm sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.converters.checkpoint import Checkpoint
from mlx_mtp.converters.layouts import convert_layout, describe
from mlx_mtp.model.config import SamplerKind
from tests.converters import layout_samples as samples
from tests.converters.layout_samples import (
    DIMS,
    KV,
    LAYERS,
    MLP,
    PATHS,
    TABLE,
    TOKENS,
    VOCAB,
    facts,
)

KIND = SamplerKind(norm="rms", norm_eps=3e-6, bias=False, residual="inner")
TOKEN_ROW = f"mask row: row {TOKENS} of the base embedding"


def checkpoint(tensors: dict[str, mx.array], **changes: Any) -> Checkpoint:
    config = samples.glora_config(**changes)
    return samples.checkpoint(
        tensors, config=config, config_name="config.json", file="model.safetensors"
    )


@pytest.mark.parametrize("prefix", ["model.", "module.model.", ""])
def test_separate_projections(prefix: str) -> None:
    source = samples.glora_tensors(fused=False, prefix=prefix)
    found = convert_layout(checkpoint(source), facts())
    assert (found.layout, found.num_draft_tokens, found.rank, found.scale) == ("mtp-glora", 3, 2, 3)
    assert found.rank_pattern == found.scale_pattern == {}
    assert found.sampler == KIND
    assert found.base_model == "someone/tiny"
    assert found.notes == (TOKEN_ROW,)
    expected = {"mask_embeddings": mx.array(np.repeat(TABLE[TOKENS : TOKENS + 1], 3, axis=0))}
    for path in PATHS:
        expected[f"{path}.lora_a"] = source[f"{prefix}{path}.lora_A.weight"].T
        expected[f"{path}.lora_b"] = source[f"{prefix}{path}.lora_B.weight"].T
    outer = prefix.removesuffix("model.")
    for part in ("linear", "norm"):
        for index in (0, 1):
            weight = source[f"{outer}sampler_head.layers.{index}.{part}.weight"]
            expected[f"sampler_head.{part}_{index + 1}.weight"] = weight
    assert samples.same(found.tensors, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_fused_projections(rslora: bool) -> None:
    source = samples.glora_tensors(fused=True)
    found = convert_layout(checkpoint(source, lora_use_rslora=rslora), facts())
    assert {name.rpartition(".")[0] for name in found.tensors if ".lora_" in name} == set(PATHS)
    x = np.random.default_rng(1).standard_normal((5, DIMS)).astype(np.float32)
    for layer in range(LAYERS):
        for fused, parts, widths in (
            ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), (DIMS, KV, KV)),
            ("mlp.gate_up_proj", ("gate_proj", "up_proj"), (MLP, MLP)),
        ):
            path = f"model.layers.{layer}.{fused}"
            a = np.array(source[f"model.{path}.lora_A.weight"])
            b = np.array(source[f"model.{path}.lora_B.weight"])
            rank, alpha = 2 * len(parts), 6 * len(parts)
            scale = alpha / math.sqrt(rank) if rslora else alpha / rank
            whole = scale * (x @ a.T) @ b.T
            outputs = []
            for part, width in zip(parts, widths, strict=True):
                own = f"model.layers.{layer}.{fused.partition('.')[0]}.{part}"
                assert found.rank_pattern.get(own, found.rank) == rank
                assert found.scale_pattern.get(own, found.scale) == scale
                lora_a = np.array(found.tensors[f"{own}.lora_a"])
                lora_b = np.array(found.tensors[f"{own}.lora_b"])
                assert lora_b.shape == (rank, width)
                outputs.append(scale * (x @ lora_a) @ lora_b)
            np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=1e-5, atol=1e-5)


def test_most_layers_give_the_rank() -> None:
    found = convert_layout(checkpoint(samples.glora_tensors(fused=True)), facts())
    assert found.rank == 6  # three projections of seven
    assert set(found.rank_pattern.values()) == {2, 4}
    assert found.scale_pattern == {}


@pytest.mark.parametrize("times", [1, 3])
def test_a_base_whose_own_layer_is_fused(times: int) -> None:
    """Nothing is split; the project may have widened it or not."""
    path = "model.layers.0.self_attn.qkv_proj"
    random = samples.Random()
    source = {
        f"model.{path}.lora_A.weight": random(2 * times, DIMS),
        f"model.{path}.lora_B.weight": random(16, 2 * times),
    }
    base = facts(linears={path: (DIMS, 16)})
    found = convert_layout(checkpoint(source, lora_use_rslora=True), base)
    assert set(found.tensors) == {"mask_embeddings", f"{path}.lora_a", f"{path}.lora_b"}
    assert found.scale == 6 * times / math.sqrt(2 * times)
    assert found.sampler is None


class TestMaskRow:
    def test_padding_of_the_base(self) -> None:
        base = facts(num_tokens=VOCAB - 1, dtype=mx.bfloat16)
        found = convert_layout(checkpoint(samples.glora_tensors(fused=False)), base)
        assert found.tensors["mask_embeddings"].dtype == mx.bfloat16

    def test_a_mask_token_of_the_tokenizer(self) -> None:
        read = checkpoint(samples.glora_tensors(fused=False))
        found = convert_layout(read, facts(num_tokens=VOCAB - 1, mask_token=7))
        assert np.array_equal(np.array(found.tensors["mask_embeddings"]), TABLE[[7, 7, 7]])

    def test_behind_the_table(self) -> None:
        read = checkpoint(samples.glora_tensors(fused=False))
        with pytest.raises(
            ValueError, match="embedding of tiny \\(40 rows\\) has a row for mask token 40"
        ):
            convert_layout(read, facts(num_tokens=VOCAB))
        found = convert_layout(read, facts(num_tokens=VOCAB), options={"mask_token_ids": "5"})
        assert np.array_equal(np.array(found.tensors["mask_embeddings"]), TABLE[[5, 5, 5]])

    def test_no_tokenizer(self) -> None:
        read = checkpoint(samples.glora_tensors(fused=False))
        with pytest.raises(ValueError, match="tokenizer, which is missing: specify"):
            convert_layout(read, facts(num_tokens=None))

    def test_one_alone(self) -> None:
        read = checkpoint(samples.glora_tensors(fused=False))
        with pytest.raises(ValueError, match="this layout has one mask token, got"):
            convert_layout(read, facts(), options={"mask_token_ids": "5,6"})

    def test_in_a_saved_table(self) -> None:
        table = np.concatenate([TABLE, np.ones((1, DIMS), np.float32)])
        source = samples.glora_tensors(fused=False)
        source["model.model.embed_tokens.weight"] = mx.array(table)
        found = convert_layout(checkpoint(source), facts(num_tokens=VOCAB))
        assert np.array(found.tensors["mask_embeddings"]).tolist() == [[1.0] * DIMS] * 3
        assert found.notes == (f"mask row: row {VOCAB} of model.model.embed_tokens.weight",)
        table[3] += 1
        source["model.model.embed_tokens.weight"] = mx.array(table)
        with pytest.raises(ValueError, match="row 3 differs from that of tiny"):
            convert_layout(checkpoint(source), facts(num_tokens=VOCAB))


def test_without_its_arguments() -> None:
    source = samples.glora_tensors(fused=False)
    read = samples.checkpoint(source, file="model.safetensors")
    options = {"num_draft_tokens": "4", "rank": "2", "alpha": "5", "norm_eps": "1e-7"}
    found = convert_layout(read, facts(), options=options)
    assert (found.num_draft_tokens, found.scale) == (4, 2.5)
    assert found.sampler is not None and found.sampler.norm_eps == 1e-7
    for key, name in (("num_draft_tokens", "draft_length"), ("rank", "lora_rank")):
        rest = {other: value for other, value in options.items() if other != key}
        with pytest.raises(ValueError, match=f"has no {name}: specify layout option"):
            convert_layout(read, facts(), options=rest)


Change = Callable[[dict[str, Any], dict[str, mx.array]], Any]
Q_PROJ = "model.model.layers.0.self_attn.q_proj"
FUSED = "model.model.layers.0.self_attn.qkv_proj"
ZEROS = mx.zeros((3, DIMS))
REFUSALS: dict[str, tuple[Change, str]] = {
    "bias": (lambda c, t: c.update(lora_bias=True), "config.json: lora_bias is not supported"),
    "bias tensor": (
        lambda c, t: t.update({f"{Q_PROJ}.lora_B.bias": ZEROS}),
        f"tensor {Q_PROJ}.lora_B.bias is a trained bias",
    ),
    "bad rank": (lambda c, t: c.update(lora_rank="2"), "config.json: lora_rank must be a number"),
    "bad alpha": (lambda c, t: c.update(lora_alpha=math.nan), "lora_alpha must be a number"),
    "no masks": (lambda c, t: c.update(draft_length=0), "draft_length must be a number of at"),
    "other rank": (lambda c, t: c.update(lora_rank=3), "has rank 2, but lora_rank is 3"),
    "four times the rank": (lambda c, t: c.update(lora_rank=1), "has rank 2, but lora_rank is 1"),
    "half a pair": (
        lambda c, t: t.pop(f"{Q_PROJ}.lora_A.weight"),
        f"{Q_PROJ} has only one of lora_A and lora_B",
    ),
    "half a sampler": (
        lambda c, t: t.pop("sampler_head.layers.1.norm.weight"),
        "the sampler lacks norm_2.weight",
    ),
    "a third block": (
        lambda c, t: t.update({"sampler_head.layers.2.norm.weight": ZEROS}),
        "tensor sampler_head.layers.2.norm.weight is unknown",
    ),
    "unknown": (lambda c, t: t.update(gate=ZEROS), "tensor gate is unknown"),
    "fused width": (
        lambda c, t: t.update(
            {
                f"{FUSED}.lora_A.weight": mx.zeros((6, DIMS)),
                f"{FUSED}.lora_B.weight": mx.zeros((9, 6)),
            }
        ),
        "self_attn.k_proj, model.layers.0.self_attn.v_proj have 8 + 4 + 4",
    ),
    "fused and separate": (
        lambda c, t: t.update(
            {
                f"{FUSED}.lora_A.weight": mx.zeros((6, DIMS)),
                f"{FUSED}.lora_B.weight": mx.zeros((16, 6)),
            }
        ),
        "model.layers.0.self_attn.q_proj of tiny occurs twice",
    ),
    "other layer": (
        lambda c, t: t.update(
            {n.replace("rs.0", "rs.9"): t.pop(n) for n in list(t) if "lora" in n}
        ),
        "is no linear layer of tiny (llama)",
    ),
    "ragged": (
        lambda c, t: t.update({f"{Q_PROJ}.lora_B.weight": mx.zeros((DIMS, 3))}),
        "are not of one rank",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line(case: str) -> None:
    change, message = REFUSALS[case]
    config, tensors = samples.glora_config(), samples.glora_tensors(fused=False)
    change(config, tensors)
    read = samples.checkpoint(tensors, config=config, config_name="config.json")
    with pytest.raises(ValueError) as caught:
        convert_layout(read, facts())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert describe(read).layout == "mtp-glora"


def test_an_option_must_not_contradict() -> None:
    read = checkpoint(samples.glora_tensors(fused=False))
    with pytest.raises(ValueError, match="option alpha is 7.0, but config.json has lora_alpha 6"):
        convert_layout(read, facts(), options={"alpha": "7"})


def test_description() -> None:
    summary = describe(checkpoint(samples.glora_tensors(fused=True)))
    assert (summary.layout, summary.base_model) == ("mtp-glora", "someone/tiny")
    assert (summary.num_draft_tokens, summary.rank, summary.scale) == (3, 2, 3.0)
    assert summary.targets == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")
    assert summary.sampler == "mlp, RMSNorm, residual inner"
    assert summary.problems == ()
    bad = describe(checkpoint(samples.glora_tensors(fused=True), lora_bias=True))
    assert bad.problems == ("config.json: lora_bias is not supported, got True",)
