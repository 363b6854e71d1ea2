"""A tiny llama GGUF file with random weights, written without PyTorch, and mutations of it."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from tests.helpers.gguf_models import add_key, add_tensor, add_vocabulary, finish

VOCABULARY, WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 300, 256, 4, 2, 256, 1
KEYS: dict[str, Any] = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": WIDTH // HEADS,
    "vocab_size": VOCABULARY,
}
_HALVES = {  # where blocks have numbers in float16
    **{Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,)},
    **{Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2)},
    **{Type.Q6_K: (208,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,)},
}


def random_rows(kind: Type, rows: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Return random stored rows ``uint8 [rows, bytes]`` of a quantised type, with usual scales."""
    rng = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    for start in _HALVES.get(kind, (0,)):
        scales = rng.uniform(0.0005, 0.002, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors."""
    head = WIDTH // HEADS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (KV_HEADS * head, WIDTH),
        "attn_v": (KV_HEADS * head, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    return {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        **{f"blk.{i}.{name}.weight": value for i in range(LAYERS) for name, value in layer.items()},
    }


def write_tiny_gguf(
    path: Path,
    kinds: tuple[Type, ...] = (Type.Q4_K,),
    *,
    keys: Mapping[str, Any] | None = None,
    general: Mapping[str, Any] | None = None,
    left_out: tuple[str, ...] = (),
    arch: str = "llama",
    scale_of_norms: float = 1.0,
) -> Path:
    """Write the model; matrices take the types in turn.

    Args:
        path: the file.
        kinds: types of matrices.
        keys: keys of the architecture with other values; None leaves one out.
        general: more keys.
        left_out: names of tensors to leave out.
        arch: the architecture that the file claims.
        scale_of_norms: what norms are multiplied by.
    """
    writer = GGUFWriter(path, arch)
    for key, value in (KEYS | dict(keys or {})).items():
        if value is not None:
            add_key(writer, f"{arch}.{key}", value)
    for key, value in (general or {}).items():
        add_key(writer, key, value)
    add_vocabulary(writer, VOCABULARY)
    rng = np.random.default_rng(1)
    for index, (name, shape) in enumerate(shapes().items()):
        kind = kinds[index % len(kinds)]
        if name in left_out:
            continue
        if len(shape) == 1:
            add_tensor(writer, name, scale_of_norms * rng.uniform(0.5, 1.5, shape), Type.F32)
        elif kind in (Type.F32, Type.F16, Type.BF16):
            add_tensor(writer, name, rng.normal(0, 0.1, shape), kind)
        else:
            writer.add_tensor(name, random_rows(kind, *shape, seed=index), raw_dtype=kind)
    finish(writer)
    return path


def mutated(content: bytes, header: int, seed: int) -> tuple[str, bytes]:
    """Return a mutation of a file and what it is.

    Args:
        content: the file.
        header: size of everything before the tensors.
        seed: selects the mutation.
    """
    rng = random.Random(seed)
    data = bytearray(content)
    where = rng.randrange(header)
    kind = rng.choice(
        ["truncated", "byte", "bits", "huge", "count", "zeros", "swapped", "moved", "nan", "text"]
    )
    if kind == "truncated":
        del data[rng.choice([where, rng.randrange(len(data)), len(data) - 1]) :]
    elif kind == "byte":
        data[where] = rng.randrange(256)
    elif kind == "bits":
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif kind == "huge":
        number = rng.choice([2**64 - 1, 2**63, 2**62 + 1, 2**40, 2**32, 2**31, 10**9, 0])
        data[where : where + 8] = struct.pack("<Q", number)
    elif kind == "count":
        number = rng.choice([0, 1, 2**64 - 1, 2**40, 10**6, rng.randrange(100)])
        data[(start := rng.choice([8, 16])) : start + 8] = struct.pack("<Q", number)
    elif kind == "zeros":
        data[where : where + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
    elif kind == "swapped":
        other, size = rng.randrange(header), rng.randrange(1, 32)
        data[where : where + size], data[other : other + size] = (
            data[other : other + size],
            data[where : where + size],
        )
    elif kind == "moved":
        data[where:where] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    elif kind == "nan":
        for _ in range(200):
            at = rng.randrange(header, len(data) - 2)
            data[at : at + 2] = struct.pack("<e", rng.choice([float("nan"), float("inf")]))
    else:
        keys = [b"llama.block_count", b"llama.attention.head_count", b"token_embd.weight"]
        keys += [b"llama.embedding_length", b"general.architecture", b"blk.0.attn_q.weight"]
        key = rng.choice(keys)
        at = content.index(key) + rng.randrange(len(key))
        data[at] = rng.choice(b"abz_.\x00\xff")
    return kind, bytes(data)
