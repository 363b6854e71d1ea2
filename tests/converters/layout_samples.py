"""Small checkpoints of every adapter layout, in random tensors, and the base model they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.converters.checkpoint import Checkpoint
from mlx_mtp.converters.layouts import BaseFacts, ConvertedAdapter
from mlx_mtp.model.config import MTPConfig, SamplerKind

DIMS, MLP, KV, LAYERS, VOCAB, TOKENS = 8, 12, 4, 2, 40, 37
LINEARS = {
    "self_attn.q_proj": (DIMS, DIMS),
    "self_attn.k_proj": (DIMS, KV),
    "self_attn.v_proj": (DIMS, KV),
    "self_attn.o_proj": (DIMS, DIMS),
    "mlp.gate_proj": (DIMS, MLP),
    "mlp.up_proj": (DIMS, MLP),
    "mlp.down_proj": (MLP, DIMS),
}
PATHS = {
    f"model.layers.{layer}.{leaf}": dims
    for layer in range(LAYERS)
    for leaf, dims in LINEARS.items()
}
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
PATH = Path("some/checkpoint")
TABLE = np.random.default_rng(99).standard_normal((VOCAB, DIMS)).astype(np.float32)
HEAD = np.random.default_rng(98).standard_normal((VOCAB, DIMS)).astype(np.float32)


def facts(*, tied: bool = True, dtype: mx.Dtype = mx.float32, **changes: Any) -> BaseFacts:
    """A base model of two layers whose embedding is ``TABLE``."""

    def rows(table: np.ndarray) -> Any:
        return lambda ids: mx.array(table)[mx.array(list(ids))].astype(dtype)

    base = BaseFacts(
        name="tiny",
        model_type="llama",
        hidden_size=DIMS,
        num_layers=LAYERS,
        vocab_size=VOCAB,
        norm_eps=3e-6,
        num_tokens=TOKENS,
        linears=PATHS if tied else {**PATHS, "lm_head": (DIMS, VOCAB)},
        embed=rows(TABLE),
        unembed=None if tied else rows(HEAD),
    )
    return dataclasses.replace(base, **changes)


class Random:
    """Random tensors from a seed."""

    def __init__(self, seed: int = 0, dtype: mx.Dtype = mx.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> mx.array:
        return mx.array(self.rng.standard_normal(shape).astype(np.float32)).astype(self.dtype)


def checkpoint(
    tensors: Mapping[str, mx.array],
    *,
    config: dict[str, Any] | None = None,
    config_name: str = "adapter_config.json",
    values: Mapping[str, Any] | None = None,
    file: str = "adapter_model.safetensors",
) -> Checkpoint:
    """A checkpoint of one file and at most one JSON file."""
    return Checkpoint(
        path=PATH,
        files={file: dict(tensors)},
        configs={} if config is None else {config_name: config},
        values=values or {},
    )


def same(first: Mapping[str, mx.array], second: Mapping[str, mx.array]) -> bool:
    """Whether two groups of tensors are equal in names, types and every bit."""
    return set(first) == set(second) and all(
        bits(first[name]) == bits(second[name]) for name in first
    )


def bits(tensor: mx.array) -> tuple[Any, ...]:
    """Type, shape and bytes of a tensor."""
    word = mx.uint32 if tensor.dtype.size == 4 else mx.uint16
    raw = np.array(mx.contiguous(tensor).view(word))
    return (str(tensor.dtype), tuple(tensor.shape), raw.tobytes())


def as_config(adapter: ConvertedAdapter, base: BaseFacts) -> MTPConfig:
    """The configuration that a converted adapter gets."""
    kind = adapter.sampler or SamplerKind()
    leaves = {name.split(".")[-2] for name in adapter.tensors if name.endswith(".lora_a")}
    return MTPConfig(
        num_draft_tokens=adapter.num_draft_tokens,
        rank=adapter.rank,
        scale=adapter.scale,
        target_modules=tuple(sorted(leaves)),
        sampler=None if adapter.sampler is None else "mlp",
        base_model=adapter.base_model or base.name,
        base_model_type=base.model_type,
        base_hidden_size=base.hidden_size,
        base_num_layers=base.num_layers,
        base_vocab_size=base.vocab_size,
        base_fingerprint="",
        sampler_norm=kind.norm,
        sampler_norm_eps=kind.norm_eps,
        sampler_bias=kind.bias,
        sampler_residual=kind.residual,
        rank_pattern=adapter.rank_pattern,
        scale_pattern=adapter.scale_pattern,
        noise_ids=adapter.noise_ids,
    )


# --- PEFT ----------------------------------------------------------------------------------------

MASK_IDS = [40, 41, 42]
MASK_KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
RANK = 4
PEFT_TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def peft_config(**changes: Any) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT writes it, with the keys that matter."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/tiny",
        "r": RANK,
        "lora_alpha": 10,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "trainable_token_indices": {"embed_tokens": MASK_IDS},
        "alora_invocation_tokens": MASK_IDS,
    }
    return config | changes


def peft_tensors(
    *,
    dtype: mx.Dtype = mx.float32,
    sampler: bool = True,
    masks: bool = True,
    prefix: str = "base_model.model.",
    ranks: Mapping[str, int] | None = None,
) -> dict[str, mx.array]:
    """Tensors of PEFT's layout; ``ranks`` by our path where they differ."""
    random = Random(dtype=dtype)
    tensors = {MASK_KEY: random(len(MASK_IDS), DIMS)} if masks else {}
    for path, (in_dims, out_dims) in PATHS.items():
        if path.split(".", 3)[3] in PEFT_TARGETS:
            rank = (ranks or {}).get(path, RANK)
            tensors[f"{prefix}{path}.lora_A.weight"] = random(rank, in_dims)
            tensors[f"{prefix}{path}.lora_B.weight"] = random(out_dims, rank)
    if sampler:
        for index, shape in ((0, (DIMS, 2 * DIMS)), (2, (DIMS,)), (3, (DIMS, DIMS)), (5, (DIMS,))):
            tensors[f"sampler.mlp.{index}.weight"] = random(*shape)
            tensors[f"sampler.mlp.{index}.bias"] = random(DIMS)
    return tensors


# --- MTP-GLoRA -----------------------------------------------------------------------------------

FUSED_TARGETS = {
    "self_attn.qkv_proj": (DIMS, DIMS + 2 * KV, 3),
    "self_attn.o_proj": (DIMS, DIMS, 1),
    "mlp.gate_up_proj": (DIMS, 2 * MLP, 2),
    "mlp.down_proj": (MLP, DIMS, 1),
}


def glora_config(**changes: Any) -> dict[str, Any]:
    """The training's arguments."""
    config = {
        "model_path": "someone/tiny",
        "draft_length": 3,
        "lora_rank": 2,
        "lora_alpha": 6,
        "lora_use_rslora": False,
        "lora_bias": False,
        "fuse_weights": True,
    }
    return config | changes


def glora_tensors(*, fused: bool, prefix: str = "model.", seed: int = 0) -> dict[str, mx.array]:
    """Tensors of a training with rank 2."""
    random = Random(seed)
    targets = FUSED_TARGETS if fused else {leaf: (*dims, 1) for leaf, dims in LINEARS.items()}
    tensors = {}
    for layer in range(LAYERS):
        for leaf, (in_dims, out_dims, times) in targets.items():
            path = f"{prefix}model.layers.{layer}.{leaf}"
            tensors[f"{path}.lora_A.weight"] = random(2 * times, in_dims)
            tensors[f"{path}.lora_B.weight"] = random(out_dims, 2 * times)
    outer = prefix.removesuffix("model.")
    for index, width in ((0, 2 * DIMS), (1, DIMS)):
        tensors[f"{outer}sampler_head.layers.{index}.linear.weight"] = random(DIMS, width)
        tensors[f"{outer}sampler_head.layers.{index}.norm.weight"] = random(DIMS)
    return tensors


# --- amateurs ------------------------------------------------------------------------------------

ADAPTED = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")
STATE_SAMPLER = {"fc1": "linear_1", "norm1": "norm_1", "fc2": "linear_2", "norm2": "norm_2"}


def state_tensors(
    *,
    prefix: str = "",
    leaf: str = "lora_A lora_B",
    flip_a: bool = False,
    flip_b: bool = False,
    bias: bool = True,
    norm_bias: bool = True,
    masks: str | None = "mask_embeddings",
    sampler: Sequence[str] = ("sampler.fc1", "sampler.norm1", "sampler.fc2", "sampler.norm2"),
) -> dict[str, mx.array]:
    """Tensors under bare names; ``flip_*`` stores that half in the other order."""
    random, (a, b) = Random(), leaf.split(" ")
    tensors = {}
    for path in ADAPTED:
        in_dims, out_dims = PATHS[path]
        lora_a, lora_b = random(RANK, in_dims), random(out_dims, RANK)
        tensors[f"{prefix}{path}.{a}"] = mx.contiguous(lora_a.T) if flip_a else lora_a
        tensors[f"{prefix}{path}.{b}"] = mx.contiguous(lora_b.T) if flip_b else lora_b
    if masks is not None:
        tensors[prefix + masks] = random(5, DIMS)
    shapes = ((DIMS, 2 * DIMS), (DIMS,), (DIMS, DIMS), (DIMS,))
    for name, shape in zip(sampler, shapes, strict=bool(sampler)):
        tensors[f"{prefix}{name}.weight"] = random(*shape)
        if norm_bias if len(shape) == 1 else bias:
            tensors[f"{prefix}{name}.bias"] = random(DIMS)
    return tensors


def state_read(tensors: dict[str, mx.array], **values: Any) -> Checkpoint:
    return checkpoint(tensors, values=values or {"lora_alpha": 6}, file="mtp.pt")


def state_expected() -> dict[str, mx.array]:
    """What ``state_tensors`` become, however they were stored."""
    source = state_tensors()
    tensors = {"mask_embeddings": source["mask_embeddings"]}
    for path in ADAPTED:
        tensors[f"{path}.lora_a"] = source[f"{path}.lora_A"].T
        tensors[f"{path}.lora_b"] = source[f"{path}.lora_B"].T
    for theirs, ours in STATE_SAMPLER.items():
        for leaf in ("weight", "bias"):
            tensors[f"sampler_head.{ours}.{leaf}"] = source[f"sampler.{theirs}.{leaf}"]
    return tensors
