"""A GGUF file as an mlx-lm model folder: weights, settings, tokenizer.

One tensor is in memory at a time, and the packed ones stay packed (``quants``).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants as reference
from gguf.constants import GGMLQuantizationType as Type

from mlx_mtp.storage.gguf.families import CLASSES, Description, Slot, describe
from mlx_mtp.storage.gguf.file import GGUFFile, GGUFTensor
from mlx_mtp.storage.gguf.quants import FLOATS, GROUP_SIZE, KEPT, dequantise, is_readable, pack
from mlx_mtp.storage.gguf.source import Source
from mlx_mtp.storage.gguf.tokenizer import generation_ids, write_tokenizer
from mlx_mtp.storage.safetensors import shown
from mlx_mtp.storage.shards import MAX_SHARD_BYTES, Item, write_items

# By mlx-lm's names: safetensors' names, and the types of which the bytes can be taken as they are.
_DTYPES = {
    "float32": ("F32", Type.F32),
    "float16": ("F16", Type.F16),
    "bfloat16": ("BF16", Type.BF16),
}
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class GGUFResult:
    """What was written.

    Attributes:
        model_type: mlx-lm's name of the architecture.
        name: the model's name in the file; None if it has none.
        licence: the licence in the file.
        num_parameters: number of parameters.
        num_bytes: size of all written tensors.
        types: one line per type of tensor: how many there are and what happened to them.
    """

    model_type: str
    name: str | None
    licence: str | None
    num_parameters: int
    num_bytes: int
    types: tuple[str, ...]


def write_model(
    file: GGUFFile,
    folder: Path,
    *,
    floats: str | None = None,
    keep: bool = True,
    written: Callable[[int], object] | None = None,
) -> GGUFResult:
    """Write a model folder; ``config.json`` is written last.

    Args:
        file: the file.
        folder: an empty folder.
        floats: ``float16``, ``bfloat16`` or ``float32`` for values that are not packed; by default
            the type of the file's matrices, float16 if they are quantised.
        keep: keep quantised tensors packed, as well as MLX can; False writes all values as
            ``floats``.
        written: called with sizes in bytes, which add up to ``file.num_bytes`` or less.

    Raises:
        ValueError: the file is not a model that can be converted; one line that names the key or
            tensor.
        OSError: the folder cannot be written.
    """
    found, special = check_model(file)
    floats = floats or float_type(file)
    try:
        write_tokenizer(file.metadata, folder)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    items = [_item(file, name, slot, floats, keep) for name, slot in found.slots.items()]
    sizes = iter([file.tensors[name].num_bytes for name in found.slots])
    parameters = sum(math.prod(slot.shape) for slot in found.slots.values())
    num_bytes = write_items(
        folder,
        items,
        max_bytes=MAX_SHARD_BYTES,
        num_parameters=parameters,
        written=None if written is None else lambda _: written(next(sizes)),
    )
    config = {
        "architectures": [CLASSES[found.config["model_type"]]],
        **found.config,
        **special,
    }
    if keep and (settings := _quantisation(file, found)):
        config["quantization"] = settings
    else:
        config["torch_dtype"] = floats
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return GGUFResult(
        model_type=config["model_type"],
        name=_text(file, "general.name"),
        licence=_text(file, "general.license"),
        num_parameters=parameters,
        num_bytes=num_bytes,
        types=tuple(type_lines(file, floats=floats, keep=keep)),
    )


def float_type(file: GGUFFile) -> str:
    """Return the type for what is not packed: that of the matrices, float16 if they are."""
    kinds = {info.type for info in file.tensors.values() if len(info.shape) > 1}
    if kinds == {Type.F32}:
        return "float32"
    return "bfloat16" if kinds <= {Type.BF16, Type.F32} and kinds else "float16"


def type_lines(file: GGUFFile, *, floats: str, keep: bool = True) -> Iterator[str]:
    """Say for each type of the file what becomes of it."""
    counts = Counter(info.type for info in file.tensors.values())
    for kind, count in sorted(counts.items(), key=lambda item: item[0].name):
        if keep and kind in KEPT:
            packed = KEPT[kind]
            what = f"{packed.note} ({packed.bits}-bit, groups of {GROUP_SIZE})"
        elif kind in FLOATS and _DTYPES[floats][1] == kind:
            what = "kept exactly"
        else:
            what = f"as {floats}" if is_readable(kind) else "not read"
        yield f"{count} {'tensor' if count == 1 else 'tensors'} {kind.name}: {what}"


def check_model(file: GGUFFile) -> tuple[Description, dict[str, Any]]:
    """Check that a file can be converted, as far as that shows without its values.

    Returns:
        What it contains, and the ids of special tokens as ``config.json`` has them.

    Raises:
        ValueError: one line that names the key or tensor.
    """
    found = describe(Source(file))
    for name, slot in found.slots.items():
        info = file.tensors[name]
        if not is_readable(info.type) or (len(slot.shape) == 1 and info.type not in FLOATS):
            raise ValueError(f"{info.path}: tensor {name} has type {info.type.name}, not read")
    return found, _special_ids(file)


def _special_ids(file: GGUFFile) -> dict[str, Any]:
    """Return the ids of special tokens, as ``config.json`` has them."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ValueError(f"{file.path} has no tokenizer.ggml.tokens")
    rows = file.tensors["token_embd.weight"].shape[0]
    if len(tokens) != rows:
        raise ValueError(f"{file.path} has {len(tokens)} tokens, token_embd.weight {rows} rows")
    try:
        return generation_ids(file.metadata)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _item(file: GGUFFile, name: str, slot: Slot, floats: str, keep: bool) -> Item:
    info, count = file.tensors[name], math.prod(slot.shape)
    if not keep or info.type not in KEPT:
        size = 4 if floats == "float32" else 2
        entries = {slot.target: (_DTYPES[floats][0], slot.shape, size * count)}
        return Item(entries, lambda: _named(info, _float_pieces(info, slot, floats)))
    bits, base = KEPT[info.type].bits, slot.target.removesuffix(".weight")
    outer, width = slot.shape[:-1], slot.shape[-1]
    groups = ("F16", (*outer, width // GROUP_SIZE), 2 * count // GROUP_SIZE)
    entries = {
        slot.target: ("U32", (*outer, width * bits // 32), count * bits // 8),
        f"{base}.scales": groups,
        f"{base}.biases": groups,
    }
    return Item(entries, lambda: _named(info, _packed_pieces(info, slot)))


def _named(info: GGUFTensor, pieces: Iterable[Any]) -> Iterator[Any]:
    """Name the tensor in errors about its values."""
    try:
        yield from pieces
    except ValueError as error:
        raise ValueError(f"{info.path}: tensor {info.name}: {error}") from None


def _packed_pieces(info: GGUFTensor, slot: Slot) -> Iterator[Any]:
    yield from pack(info.type, _rows(info, slot))


def _float_pieces(info: GGUFTensor, slot: Slot, floats: str) -> Iterator[Any]:
    rows = _rows(info, slot)
    step = max(1, _CHUNK_VALUES // slot.shape[-1])
    for start in range(0, len(rows), step):
        chunk = np.ascontiguousarray(rows[start : start + step])
        values = dequantise(info.type, chunk)
        if info.type == _DTYPES[floats][1] and not slot.offset:
            yield chunk
        else:
            yield _cast(values - np.float32(slot.offset), floats)


def _cast(values: np.ndarray, floats: str) -> np.ndarray:
    if floats == "float32":
        return np.ascontiguousarray(values)
    if floats == "bfloat16":
        return np.ascontiguousarray(reference.quantize(values, Type.BF16))
    with np.errstate(over="ignore"):
        cast = values.astype(np.float16)
    if not np.isfinite(cast).all():
        raise ValueError("it has values beyond float16; convert it with --dtype bfloat16")
    return cast


def _rows(info: GGUFTensor, slot: Slot) -> np.ndarray:
    """Return the stored rows ``[R, bytes]`` in the order of mlx-lm; a vector has a row per value.

    llama.cpp interleaves the two rotary halves of a head's rows, which is undone here.
    """
    rows = info.rows()
    if len(slot.shape) == 1:
        rows = rows.reshape(slot.shape[0], -1)
    rows = rows.reshape(-1, rows.shape[-1])
    if slot.heads:
        order = np.arange(len(rows)).reshape(slot.heads, -1, 2)
        rows = rows[order.swapaxes(1, 2).reshape(-1)]
    return rows


def _quantisation(file: GGUFFile, found: Description) -> dict[str, Any]:
    """Return mlx-lm's ``quantization``: the bits of most modules, then those of the others."""
    bits = {
        slot.target.removesuffix(".weight"): KEPT[file.tensors[name].type].bits
        for name, slot in found.slots.items()
        if file.tensors[name].type in KEPT
    }
    if not bits:
        return {}
    usual = Counter(bits.values()).most_common(1)[0][0]
    others = {
        module: {"group_size": GROUP_SIZE, "bits": value}
        for module, value in bits.items()
        if value != usual
    }
    return {"group_size": GROUP_SIZE, "bits": usual, **others}


def _text(file: GGUFFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return shown(value) if isinstance(value, str) and value.strip() else None
