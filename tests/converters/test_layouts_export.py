"""The way back: converting what was exported is the identity, and real PEFT takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from mlx_mtp.converters.checkpoint import Checkpoint, read_checkpoint
from mlx_mtp.converters.layouts import ConvertedAdapter, convert_layout, to_peft
from mlx_mtp.converters.layouts.common import LowRankLayer, assemble
from mlx_mtp.converters.layouts.peft_export import exact_alpha
from mlx_mtp.model.config import MTPConfig, SamplerKind
from tests.converters import layout_samples as samples
from tests.converters.layout_samples import DIMS, KV, MLP, PATHS, checkpoint, facts

IDS = [44, 40, 43, 41, 42]


def adapter(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    k: int = 3,
    sampler: bool = True,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    default: tuple[int, float] | None = None,
) -> ConvertedAdapter:
    """A random adapter on the layers of ``ranks``."""
    random = samples.Random(seed, dtype)
    layers = [
        LowRankLayer(
            path=path,
            lora_a=random(PATHS[path][0], rank),
            lora_b=random(rank, PATHS[path][1]),
            scale=scales[path],
        )
        for path, rank in ranks.items()
    ]
    shapes = {"linear_1": (DIMS, 2 * DIMS), "linear_2": (DIMS, DIMS), "norm_1": (DIMS,)}
    head = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    head["norm_2.weight"] = random(DIMS)
    head |= {f"{layer}_{n}.bias": random(DIMS) for layer in ("linear", "norm") for n in "12"}
    return assemble(
        layers,
        layout="peft-mtp",
        masks=random(k, DIMS),
        sampler=SamplerKind() if sampler else None,
        sampler_tensors=head if sampler else {},
        base_model="someone/tiny",
        default=default,
    )


def export(found: ConvertedAdapter) -> Checkpoint:
    """What ``to_peft`` makes of an adapter, through JSON and back."""
    config, tensors, sampler = to_peft(
        samples.as_config(found, facts()),
        found.tensors,
        mask_token_ids=IDS[: found.num_draft_tokens],
    )
    files = {"adapter_model.safetensors": tensors, "sampler_model.safetensors": sampler or {}}
    configs = {"adapter_config.json": json.loads(json.dumps(config))}
    return Checkpoint(path=samples.PATH, files=files, configs=configs)


def assert_identity(found: ConvertedAdapter) -> None:
    again = convert_layout(export(found), facts())
    assert samples.same(again.tensors, found.tensors)
    before, after = (samples.as_config(value, facts()).to_dict() for value in (found, again))
    assert before == after
    assert json.dumps(before) == json.dumps(after)


RANKS = st.integers(1, 9)
ALPHAS = st.one_of(st.integers(1, 64), st.floats(0.01, 100, allow_nan=False))


@st.composite
def reachable(draw: st.DrawFn) -> ConvertedAdapter:
    """An adapter whose scales come from an alpha, by one of PEFT's two formulas."""
    paths = draw(st.lists(st.sampled_from(sorted(PATHS)), min_size=1, max_size=6, unique=True))
    rslora = draw(st.booleans())
    ranks = {path: draw(RANKS) for path in [*paths, ""]}
    scales = {
        path: draw(ALPHAS) / (math.sqrt(rank) if rslora else rank) for path, rank in ranks.items()
    }
    default = (ranks.pop(""), scales.pop(""))
    return adapter(
        ranks,
        scales,
        k=draw(st.integers(1, 5)),
        sampler=draw(st.booleans()),
        dtype=draw(st.sampled_from(samples.DTYPES)),
        seed=draw(st.integers(0, 9)),
        default=draw(st.sampled_from([default, None])),
    )


@given(reachable())
def test_convert_after_export_is_the_identity(found: ConvertedAdapter) -> None:
    assert_identity(found)


@given(RANKS, RANKS, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_any_scale_is_exact_or_refused(first: int, second: int, one: float, two: float) -> None:
    paths = sorted(PATHS)[:2]
    found = adapter(
        dict(zip(paths, (first, second), strict=True)), dict(zip(paths, (one, two), strict=True))
    )
    try:
        assert_identity(found)
    except ValueError as error:
        assert "cannot be expressed in PEFT's layout" in str(error)
        assert {first, second} - {1, 2, 4, 8}  # any scale is exact at a power of two


@given(st.integers(1, 512), ALPHAS, st.booleans())
def test_alpha_is_found_wherever_there_is_one(rank: int, alpha: float, rslora: bool) -> None:
    divisor = math.sqrt(rank) if rslora else rank
    found = exact_alpha(alpha / divisor, rank, use_rslora=rslora)
    assert found is not None
    assert found / divisor == alpha / divisor
    if isinstance(alpha, int):
        assert isinstance(found, int)


@pytest.mark.parametrize("scale", [0.0, -2.5, 1e-320, 1e300, 0.7, 1 / 3])
@pytest.mark.parametrize("rank", [1, 3, 6, 7, 128])
def test_odd_scales(scale: float, rank: int) -> None:
    found = [exact_alpha(scale, rank, use_rslora=way) for way in (False, True)]
    for alpha, divisor in zip(found, (rank, math.sqrt(rank)), strict=True):
        assert alpha is None or alpha / divisor == scale
    assert exact_alpha(1.7e308, 3, use_rslora=False) is None


@pytest.mark.parametrize("fused", [False, True])
def test_layers_of_another_layout(fused: bool) -> None:
    """Whatever layout the low-rank weights came in, PEFT's layout takes them."""
    config = samples.glora_config(lora_use_rslora=True)
    read = checkpoint(samples.glora_tensors(fused=fused), config=config, config_name="config.json")
    found = convert_layout(read, facts())
    kept = {name: value for name, value in found.tensors.items() if "sampler" not in name}
    plain = ConvertedAdapter(**{**vars(found), "tensors": kept, "sampler": None, "layout": ""})
    assert_identity(plain)


def config_of(found: ConvertedAdapter, **changes: Any) -> MTPConfig:
    return MTPConfig.from_dict(samples.as_config(found, facts()).to_dict() | changes)


SMALL = {"model.layers.0.self_attn.q_proj": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_norm": "rms"}, "PEFT's layout has no sampler head with RMSNorm"),
        ({"sampler_residual": "inner"}, "has no sampler head with residual 'inner'"),
        ({"sampler_residual": "none"}, "has no sampler head with residual 'none'"),
        ({"sampler_bias": False}, "has no sampler head without bias"),
        ({"sampler_norm_eps": 1e-6}, "has no sampler head with norm_eps 1e-06"),
        ({"rank": 4}, r"q_proj.lora_a has shape \(8, 3\), not rank 4"),
        ({"scale": 1.9}, "scale 1.9 of the adapter cannot be expressed in PEFT's layout"),
    ],
)
def test_what_the_layout_cannot_express(changes: dict[str, Any], message: str) -> None:
    found = adapter(SMALL, dict.fromkeys(SMALL, 2.0))
    with pytest.raises(ValueError, match=message) as caught:
        to_peft(config_of(found, **changes), found.tensors, mask_token_ids=IDS[:3])
    assert "\n" not in str(caught.value)


def test_weights_per_expert_and_per_layer_masks() -> None:
    found = adapter(SMALL, dict.fromkeys(SMALL, 2.0))
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    experts = {f"{path}.lora_a": mx.zeros((2, 8, 3)), f"{path}.lora_b": mx.zeros((2, 3, 8))}
    per_layer = {"mask_per_layer_embeddings": mx.zeros((3, 16))}
    for more, message in [
        (experts, f"PEFT's layout has no low-rank weights per expert, as {path} has them"),
        (per_layer, "PEFT's layout has no place for mask_per_layer_embeddings"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_peft(config_of(found), found.tensors | more, mask_token_ids=IDS[:3])


@pytest.mark.parametrize("ids", [[40, 41], [40, 41, 41], [40, 41, -1]])
def test_mask_tokens_must_be_k(ids: list[int]) -> None:
    found = adapter(SMALL, dict.fromkeys(SMALL, 2.0))
    with pytest.raises(ValueError, match="3 different mask tokens are needed, got"):
        to_peft(config_of(found), found.tensors, mask_token_ids=ids)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gate", "tensor gate is unknown"),
        ("sampler_head.linear_3.weight", "tensor sampler_head.linear_3.weight is unknown"),
    ],
)
def test_unknown_tensors(name: str, message: str) -> None:
    found = adapter(SMALL, dict.fromkeys(SMALL, 2.0))
    tensors = found.tensors | {name: mx.zeros((2, 2))}
    with pytest.raises(ValueError, match=message):
        to_peft(config_of(found), tensors, mask_token_ids=IDS[:3])


def test_mask_tokens_alone() -> None:
    found = adapter(SMALL, dict.fromkeys(SMALL, 2.0), sampler=False)
    masks = {"mask_embeddings": found.tensors["mask_embeddings"]}
    with pytest.raises(ValueError, match="no low-rank weights, which PEFT's layout requires"):
        to_peft(config_of(found), masks, mask_token_ids=IDS[:3])


def test_settings() -> None:
    paths = [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)] + ["model.layers.1.mlp.up_proj"]
    ranks = dict(zip(paths, (4, 4, 2), strict=True))
    found = adapter(ranks, dict.fromkeys(paths, 2.5))
    config, tensors, sampler = to_peft(config_of(found), found.tensors, mask_token_ids=[9, 7, 8])
    assert config["r"] == 4
    assert config["lora_alpha"] == 10 and isinstance(config["lora_alpha"], int)
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == {r"model\.layers\.1\.mlp\.up_proj": 2}
    assert config["alpha_pattern"] == {r"model\.layers\.1\.mlp\.up_proj": 5}
    # down_proj everywhere, up_proj in one layer of two
    assert config["target_modules"] == ["down_proj", "model.layers.1.mlp.up_proj"]
    assert config["trainable_token_indices"] == config["alora_invocation_tokens"] == [9, 7, 8]
    assert config["base_model_name_or_path"] == "someone/tiny"
    assert samples.MASK_KEY in tensors
    assert sampler is not None and len(sampler) == 8


# --- real PEFT -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:.*missing.*", "error:.*unexpected.*")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_real_peft_takes_it(tmp_path: Path, tied: bool, rslora: bool) -> None:
    """PEFT loads an exported adapter to train on, with our values, and writes it back the same."""
    ranks = {path: 3 if "v_proj" in path else 4 for path in PATHS if "k_proj" not in path}
    del ranks["model.layers.0.mlp.gate_proj"]
    divisor = {path: math.sqrt(rank) if rslora else rank for path, rank in ranks.items()}
    scales = {path: (7 if "down" in path else 10) / divisor[path] for path in ranks}
    found = adapter(ranks, scales)
    read = export(found)
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, tensors in read.files.items():
        mx.save_safetensors(str(folder / name), dict(tensors), {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(read.configs["adapter_config.json"]))
    live: Any = PeftModel.from_pretrained(torch_base(tied=tied), str(folder), is_trainable=True)
    modules = dict(live.get_base_model().named_modules())
    for path in PATHS:
        assert hasattr(modules[path], "lora_A") == (path in ranks), path
    for path, rank in ranks.items():
        assert modules[path].r["default"] == rank
        assert modules[path].scaling["default"] == scales[path]
        weight = modules[path].lora_B["default"].weight.detach().numpy()
        assert np.array_equal(weight.T, np.array(found.tensors[f"{path}.lora_b"]))
    rows = modules["model.embed_tokens"](torch.tensor(IDS[:3])).detach().numpy()
    assert np.array_equal(rows, np.array(found.tensors["mask_embeddings"]))
    live.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    (folder / "sampler_model.safetensors").rename(tmp_path / "again" / "sampler_model.safetensors")
    again = convert_layout(read_checkpoint(tmp_path / "again"), facts())
    assert samples.same(again.tensors, found.tensors)
    assert again.rank_pattern == found.rank_pattern
    assert again.scale_pattern == found.scale_pattern


def torch_base(*, tied: bool) -> LlamaForCausalLM:
    """A model of the shape of ``facts`` with room for the mask tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=45, hidden_size=DIMS, intermediate_size=MLP, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=KV, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)
