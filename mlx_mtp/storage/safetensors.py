"""Safetensors files and their index files, read only after their headers were validated.

MLX never opens a file that ``check_safetensors`` has not accepted: the header is bounded, is JSON
without repeated keys, every shape agrees with its bytes, and the bytes cover the file exactly.
Only the header is read, so the check takes the same time for a file of any size.

``safetensors.safe_open`` is not enough: of 4,902 mutated files refused here it accepts 124, those
with a repeated key (readers disagree on which one counts) or with unknown fields in an entry.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

# Bytes per element.  The types that ITEM_BYTES adds are valid, but MLX has none of them: it
# refuses some and reads the others as raw bytes, so ``read_safetensors`` refuses them.
READABLE = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "C64": 8},
}
ITEM_BYTES = READABLE | {"F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}

MAX_HEADER_BYTES = 32 << 20
MAX_JSON_BYTES = 16 << 20
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 8
MAX_NAME = 1024
_MAX_EXTENT = 2**31 - 1  # MLX keeps extents as 32-bit numbers
_MAX_ELEMENTS = 2**48  # far beyond any file, so that strides of empty tensors cannot overflow


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The header's entry for one tensor.

    Attributes:
        dtype: safetensors' name of the type, e.g. ``BF16``.
        shape: dimensions.
        start: offset of its first byte from the start of the file.
        num_bytes: size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def check_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Check the header of a safetensors file against the file; no tensor is read.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        ValueError: the file is missing, truncated, corrupt or absurd; one line that names it.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, size)
        return _check_header(header, data_start=data_start, size=size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from None


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """Check a safetensors file, then open it; the tensors are read when they are first used.

    Raises:
        ValueError: the file is invalid or has a tensor of a type that MLX does not support.
    """
    for name, info in check_safetensors(path).items():
        if info.dtype not in READABLE:
            raise ValueError(f"{path}: tensor {name} has type {info.dtype}, which MLX cannot read")
    return load_safetensors(path)


def load_safetensors(path: Path) -> dict[str, mx.array]:
    """Open a safetensors file that was checked; the tensors are read when they are first used.

    Raises:
        ValueError: MLX cannot open it.
    """
    try:
        # By format: MLX would otherwise choose its parser by the file's suffix.
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {shown(error)}") from None
    assert isinstance(tensors, dict)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata in the header of a safetensors file.

    Raises:
        ValueError: the file is missing or its header is not valid; one line that names it.
    """
    try:
        with open_regular(path) as file:
            header, _ = _read_header(file, os.fstat(file.fileno()).st_size)
        metadata = header.get("__metadata__")
        _check_metadata(metadata)
        return metadata or {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from None


def read_raw_tensors(
    file: Any,
) -> tuple[dict[str, str], dict[str, tuple[TensorInfo, memoryview]]]:
    """Read a whole open safetensors file, without MLX.

    Returns:
        The metadata, and the entry and the bytes of each tensor by name.

    Raises:
        ValueError: the file is truncated, corrupt or absurd.
        OSError: it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    header, data_start = _read_header(file, size)
    metadata = header.get("__metadata__") or {}
    infos = _check_header(header, data_start=data_start, size=size)
    data = memoryview(file.read(size - data_start))
    if len(data) != size - data_start:
        raise ValueError("it became shorter while it was read")

    def part(info: TensorInfo) -> memoryview:
        start = info.start - data_start
        return data[start : start + info.num_bytes]

    return metadata, {name: (info, part(info)) for name, info in infos.items()}


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return the header of a safetensors file, for a writer that appends the tensors' bytes.

    Args:
        tensors: type, shape and number of bytes by name, in the order of the bytes.
        metadata: the metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + num_bytes],
        }
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_index(path: Path) -> dict[str, str]:
    """Read the ``weight_map`` of an index file: tensor name to file name.

    Raises:
        ValueError: the index is invalid, or names a file that is missing or in another folder.
    """
    weight_map = read_weight_map(path)
    for name in sorted(set(weight_map.values())):
        try:
            safe_member(path.parent, name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return weight_map


def read_weight_map(path: Path) -> dict[str, str]:
    """Read an index file as ``read_index`` does; the files that it names may be missing.

    Raises:
        ValueError: the index is invalid, or what it names is not a plain file name.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: the file of {shown(tensor)} must be a name, not {name!r}")
    for name in sorted(set(weight_map.values())):
        if not is_plain_name(name):
            raise ValueError(f"{path}: {shown(repr(name))} is not a plain file name")
    return weight_map


def safe_member(folder: Path, name: str) -> Path:
    """Return the path of a file that an index names, which must be directly in ``folder``.

    Raises:
        ValueError: the name is not a plain file name, or the file does not exist.
    """
    if not is_plain_name(name):
        raise ValueError(f"{shown(repr(name))} is not a plain file name")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{name} is missing from {folder}")
    return path


def is_plain_name(name: object) -> bool:
    """Whether this is a file name without a path, on any system."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= 255:
        return False
    return name.isprintable() and not set(name) & set('/\\:*?"<>|') and bool(name.strip(". "))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must contain an object.

    Raises:
        ValueError: the file is missing, too long, not JSON, or not an object; one line.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file of any kind.

    Raises:
        ValueError: the file is missing, too long or not JSON; one line.
    """
    try:
        with open_regular(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it is longer than {MAX_JSON_BYTES >> 20} MiB")
        return parse_json(text, infinities=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {shown(error)}") from None


def parse_json(text: bytes, *, infinities: bool = False) -> Any:
    """Parse JSON strictly: UTF-8, no repeated keys, no endless nesting.

    Args:
        text: the JSON.
        infinities: accept NaN and Infinity, which Python's own writer produces.

    Raises:
        ValueError: it is not such JSON.
    """
    try:
        constant = float if infinities else _refuse_constant
        return json.loads(text.decode(), object_pairs_hook=_unique_keys, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def open_regular(path: Path) -> Any:
    """Open a regular file for reading bytes; a pipe or a device is refused without waiting.

    Raises:
        ValueError: it is not a regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def shown(value: object, *, limit: int = 200) -> str:
    """Return text from a file in a form that is safe to print in a one-line message."""
    text = " ".join(str(value).split()) or type(value).__name__
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def _read_header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """Return the parsed header and where the data begins."""
    head = file.read(8)
    if len(head) < 8:
        raise ValueError(f"it has only {len(head)} bytes")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if length > size - 8:
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its header is not JSON: {shown(error)}") from None
    assert isinstance(header, dict)
    return header, 8 + length


def _check_header(header: dict[str, Any], *, data_start: int, size: int) -> dict[str, TensorInfo]:
    """Check every entry, and that all together cover the data without gaps or overlaps."""
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it lists {len(header)} tensors, at most {MAX_TENSORS} are read")
    tensors = {name: _check_entry(name, entry, data_start) for name, entry in header.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes))
    end = data_start
    for name, info in ordered:
        if info.start != end:
            raise ValueError(f"tensor {name} begins at byte {info.start}, not at {end}")
        end += info.num_bytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return dict(ordered)


def _check_entry(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"{shown(repr(name))} is no name for a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name} has unknown type {shown(repr(dtype))}")
    if (
        not _whole_numbers(shape)
        or len(shape) > MAX_DIMENSIONS
        or max(shape, default=0) > (_MAX_EXTENT)
    ):
        raise ValueError(f"tensor {name} has absurd shape {shown(repr(shape))}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has absurd data_offsets {shown(repr(offsets))}")
    if math.prod(extent or 1 for extent in shape) >= _MAX_ELEMENTS:
        raise ValueError(f"tensor {name} has absurd shape {shape}")
    num_bytes = ITEM_BYTES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f"tensor {name} of shape {shape} and type {dtype} needs {num_bytes} bytes, "
            f"its data_offsets give {shown(offsets[1] - offsets[0])}"
        )
    start = data_start + offsets[0]
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=start, num_bytes=num_bytes)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:  # MLX writes null for no metadata
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ must map names to text")


def _whole_numbers(values: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """Build an object, refusing repeated keys: readers disagree on which one counts."""
    built = dict(pairs)
    if len(built) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(repr(twice))} comes twice")
    return built


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
