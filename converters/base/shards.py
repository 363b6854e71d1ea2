"""Write tensors as safetensors shards, one tensor in memory at a time.

The header of a file needs only types and shapes, which lazy arrays have before they are computed.
So tensors are computed, written and freed one by one: the peak is one tensor (and what its graph
needs), not one file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    **{mx.bool_: "BOOL", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64"},
    **{mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64"},
    **{mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32", mx.complex64: "C64"},
}


def write_shards(
    folder: Path,
    tensors: dict[str, mx.array],
    *,
    max_bytes: int,
    num_parameters: int | None = None,
    written: Callable[[int], object] | None = None,
) -> int:
    """Write ``model.safetensors`` or ``model-00001-of-0000N.safetensors`` and the index.

    Args:
        folder: where to write.
        tensors: by name, lazy or not; emptied while writing.  Memory is freed only if there are
            no other references.
        max_bytes: maximum size of a shard, unless a single tensor is larger.
        num_parameters: for the index.
        written: called with the size of a tensor after it is written.

    Returns:
        The size of all tensors in bytes.

    Raises:
        OSError: the disk is full or cannot be written.
        ValueError: a tensor's type does not exist in safetensors files.
    """
    plan = _plan(tensors, max_bytes)
    metadata: dict[str, int] = {"total_size": sum(value.nbytes for value in tensors.values())}
    if num_parameters is not None:
        metadata["total_parameters"] = num_parameters
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file_name = "model.safetensors"
        if len(plan) > 1:
            file_name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: tensors[name] for name in names}))
            for name in names:
                size = _write_tensor(file, tensors.pop(name))
                mx.clear_cache()
                if written is not None:
                    written(size)
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=4), encoding="utf-8")
    return metadata["total_size"]


def _plan(tensors: dict[str, mx.array], max_bytes: int) -> list[list[str]]:
    """Distribute tensors over shards in their order."""
    shards: list[list[str]] = []
    size = 0
    for name, value in tensors.items():
        if not shards or size + value.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    return shards


def _header(tensors: dict[str, mx.array]) -> bytes:
    """Return the header of a file with these tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has type {value.dtype}, which safetensors files cannot contain"
            )
        end = offset + value.nbytes
        entries[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins where every type is aligned
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, value: mx.array) -> int:
    """Compute a tensor and write it; return its size in bytes."""
    if value.size:
        data: Any = value.reshape(-1).view(mx.uint8)
        file.write(memoryview(data))
    return value.nbytes
