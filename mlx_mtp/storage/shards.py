"""Write tensors as safetensors shards, one tensor in memory at a time.

The header of a file needs only types, shapes and sizes, which are known before a tensor is computed
or read.  So tensors are made, written and freed one by one: the peak is one tensor (and what it is
made from), not one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from mlx_mtp.storage.safetensors import safetensors_header

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30  # as mlx-lm

_DTYPES = {
    **{mx.bool_: "BOOL", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64"},
    **{mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64"},
    **{mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32", mx.complex64: "C64"},
}


@dataclass(frozen=True)
class Item:
    """Tensors that are made together.

    Attributes:
        entries: type, shape and number of bytes by name, in the order of the bytes.
        pieces: makes their bytes, in pieces of any size.
    """

    entries: Mapping[str, tuple[str, Sequence[int], int]]
    pieces: Callable[[], Iterable[Any]]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(size for _, _, size in self.entries.values())


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

    items = _items(tensors)
    return write_items(
        folder, items, max_bytes=max_bytes, num_parameters=num_parameters, written=written
    )


def write_file(path: Path, tensors: dict[str, mx.array], *, metadata: Mapping[str, str]) -> int:
    """Write one safetensors file; see ``write_shards``.

    Returns:
        The size of all tensors in bytes.
    """
    items = _items(tensors)
    _write_shard(path, items, metadata)
    return sum(item.num_bytes for item in items)


def write_items(
    folder: Path,
    items: Sequence[Item],
    *,
    max_bytes: int = MAX_SHARD_BYTES,
    num_parameters: int | None = None,
    written: Callable[[int], object] | None = None,
) -> int:
    """Write tensors as ``write_shards`` does; those of an item come into the same file.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    plan = _plan(items, max_bytes)
    metadata: dict[str, int] = {"total_size": sum(item.num_bytes for item in items)}
    if num_parameters is not None:
        metadata["total_parameters"] = num_parameters
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan, 1):
        file_name = "model.safetensors"
        if len(plan) > 1:
            file_name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        weight_map |= dict.fromkeys((name for item in shard for name in item.entries), file_name)
        _write_shard(folder / file_name, shard, {"format": "mlx"}, written=written)
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=4), encoding="utf-8")
    return metadata["total_size"]


def _items(tensors: dict[str, mx.array]) -> list[Item]:
    """Describe tensors, each of which is removed when it is written."""

    def item(name: str, value: mx.array) -> Item:
        if value.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has type {value.dtype}, which safetensors files cannot contain"
            )
        entry = _DTYPES[value.dtype], value.shape, value.nbytes
        return Item({name: entry}, lambda: _computed(tensors.pop(name)))

    return [item(name, value) for name, value in tensors.items()]


def _write_shard(
    path: Path,
    items: Sequence[Item],
    metadata: Mapping[str, str],
    *,
    written: Callable[[int], object] | None = None,
) -> None:
    entries = {name: entry for item in items for name, entry in item.entries.items()}
    with path.open("wb") as file:
        file.write(safetensors_header(entries, metadata))
        for item in items:
            _write_item(file, item)
            if written is not None:
                written(item.num_bytes)


def _write_item(file: BinaryIO, item: Item) -> None:
    for piece in item.pieces():
        file.write(piece)


def _plan(items: Sequence[Item], max_bytes: int) -> list[list[Item]]:
    """Distribute items over shards in their order."""
    shards: list[list[Item]] = []
    size = 0
    for item in items:
        if not shards or size + item.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    return shards


def _computed(value: mx.array) -> Iterable[Any]:
    """Compute a tensor and yield its bytes; its memory is freed after they were written."""
    if value.size:
        data: Any = value.reshape(-1).view(mx.uint8)
        yield memoryview(data)
        del data
    del value
    mx.clear_cache()
