"""The header of a GGUF file, read strictly: no claim in it is believed before it was checked.

PyPI's ``gguf`` has a reader too, but it makes several arrays for every token of a vocabulary (a
minute for 262,144 of them), and loops and allocates as a header's counts say.  Here every count is
compared with the bytes that are left before anything is built from it, and a file is refused for
what llama.cpp refuses: repeated names, tensors that overlap, end beyond the file, or are out of
place.  The tensors stay on disk, mapped into memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlx_mtp.storage.gguf import SUFFIX
from mlx_mtp.storage.gguf.parts import is_part, part_paths
from mlx_mtp.storage.safetensors import open_regular, shown

VERSIONS = (2, 3)
MAX_KEYS = 65_536
MAX_TENSORS = 250_000
MAX_NAME = 1024
MAX_TEXT = 64 << 20
MAX_ITEMS = 16 << 20  # of an array
MAX_DIMENSIONS = 4
_MAX_EXTENT = 2**31 - 1  # MLX keeps extents as 32-bit numbers
_MAX_ALIGNMENT = 1 << 20
_KEY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # of the smallest entries

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}

Type = GGMLQuantizationType


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """The header's entry for one tensor.

    Attributes:
        path: the file that contains it.
        name: its name.
        type: how its values are stored.
        shape: dimensions in the order of NumPy: rows of ``shape[-1]`` values are contiguous.
        start: offset of its first byte from the start of the file.
        num_bytes: size in bytes.
    """

    path: Path
    name: str
    type: Type
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def rows(self) -> np.ndarray:
        """Return the stored bytes, ``uint8 [..., bytes per row]``, mapped from the disk.

        Raises:
            ValueError: the file became shorter.
        """
        try:
            data = np.memmap(self.path, mode="r", offset=self.start, shape=(self.num_bytes,))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} changed while it was read: {error}") from None
        block, size = GGML_QUANT_SIZES[self.type]
        return data.reshape(*self.shape[:-1], self.shape[-1] // block * size)


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A GGUF file, or all files of a split one, whose headers were checked.

    Attributes:
        paths: the files.
        metadata: values by key: numbers, text, truth values, NumPy arrays of numbers, lists of
            text.
        tensors: by name, in the order of their bytes.
        num_bytes: size of the files.
    """

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    num_bytes: int

    @property
    def path(self) -> Path:
        """The file, or the first one."""
        return self.paths[0]


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file and check it against the file; no tensor is read.

    The parts of a split file (``NAME-00001-of-00003.gguf``) are joined, whichever is named.

    Raises:
        ValueError: the file is missing, truncated, corrupt, absurd, or of a kind that is not read;
            one line that names it.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return first
    if not isinstance(count, int) or not is_part(path, count):
        name = f"-00001-of-{count:0>5}{SUFFIX}"
        raise ValueError(f"{path} is one part of {shown(count)}: its name must end in {name}")
    return _joined([_read_one(part) for part in part_paths(path)])


def _joined(files: Sequence[GGUFFile]) -> GGUFFile:
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(files):
        named = part.metadata.get("split.no"), part.metadata.get("split.count")
        if named != (number, len(files)):
            raise ValueError(
                f"{part.path} says that it is part {shown(named[0])} of {shown(named[1])}, "
                f"by its name it is {number} of {len(files)}"
            )
        for name, info in part.tensors.items():
            if name in tensors:
                raise ValueError(f"tensor {name} is both in {tensors[name].path} and {part.path}")
            tensors[name] = info
    total = files[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(f"{files[0].path} counts {total} tensors, its parts have {len(tensors)}")
    return GGUFFile(
        paths=tuple(part.path for part in files),
        metadata=files[0].metadata,
        tensors=tensors,
        num_bytes=sum(part.num_bytes for part in files),
    )


def _read_one(path: Path) -> GGUFFile:
    """Read one file, which may be a part."""
    try:
        with open_regular(path) as file:
            head = file.read(24)
            _check_magic(head)
        data = np.memmap(path, mode="r")
        return _Scan(path, data).file()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a sound GGUF file: {error}") from None


def _check_magic(head: bytes) -> None:
    if head[:4] != b"GGUF":
        raise ValueError(f"it begins with {shown(repr(head[:4]))}, not with GGUF")
    if len(head) < 24:
        raise ValueError(f"it has only {len(head)} bytes")
    (version,) = struct.unpack_from("<I", head, 4)
    if version & 0xFFFF == 0 and version:
        raise ValueError("it is big-endian, which is not read")
    if version not in VERSIONS:
        allowed = " and ".join(map(str, VERSIONS))
        raise ValueError(f"it has version {version}, versions {allowed} are read")


class _Scan:
    """A position in the header that moves forward and never beyond the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self.buffer = memoryview(data)  # pyright: ignore[reportArgumentType]
        self.size = data.nbytes
        self.offset = 8

    def file(self) -> GGUFFile:
        num_tensors, num_keys = self.number("<Q"), self.number("<Q")
        self._check_count(num_keys, "keys", MAX_KEYS, _KEY_BYTES)
        self._check_count(num_tensors, "tensors", MAX_TENSORS, _TENSOR_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text("a key", MAX_NAME)
            if key in metadata:
                raise ValueError(f"key {shown(key)} comes twice")
            if not key.isprintable() or not key:
                raise ValueError(f"{shown(repr(key))} is no key")
            metadata[key] = self.value(key)
        entries = [self.entry() for _ in range(num_tensors)]
        alignment = _alignment(metadata)
        start = -(-self.offset // alignment) * alignment
        tensors = _place(self.path, entries, start=start, alignment=alignment, size=self.size)
        return GGUFFile(paths=(self.path,), metadata=metadata, tensors=tensors, num_bytes=self.size)

    def number(self, kind: str) -> Any:
        width = struct.calcsize(kind)
        self._check_left(width, "its header")
        (value,) = struct.unpack_from(kind, self.buffer, self.offset)
        self.offset += width
        return value

    def text(self, what: str, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise ValueError(f"{what} claims {length} bytes, at most {limit} are read")
        self._check_left(length, what)
        raw = bytes(self.buffer[self.offset : self.offset + length])
        self.offset += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8: {shown(repr(raw))}") from None

    def value(self, key: str) -> Any:
        kind = self.value_type(key)
        if kind == GGUFValueType.STRING:
            return self.text(key, MAX_TEXT)
        if kind != GGUFValueType.ARRAY:
            return self.numbers(key, kind, 1).tolist()[0]
        kind, count = self.value_type(key), self.number("<Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"{key} is an array of arrays, which is not read")
        width = 8 if kind == GGUFValueType.STRING else np.dtype(_SCALARS[kind]).itemsize
        self._check_count(count, f"items of {key}", MAX_ITEMS, width)
        return (
            self.texts(key, count)
            if kind == GGUFValueType.STRING
            else self.numbers(key, kind, count)
        )

    def value_type(self, key: str) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise ValueError(f"{shown(key)} has unknown type {number}") from None

    def numbers(self, key: str, kind: GGUFValueType, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        self._check_left(count * dtype.itemsize, key)
        if kind == GGUFValueType.BOOL:
            raw = np.frombuffer(self.buffer, np.uint8, count, self.offset)
            if raw.size and raw.max() > 1:
                raise ValueError(f"{shown(key)} is neither true nor false: {raw.max()}")
        values = np.frombuffer(self.buffer, dtype, count, self.offset).copy()
        self.offset += values.nbytes
        return values

    def texts(self, key: str, count: int) -> list[str]:
        """Read a list of text in one loop: vocabularies have hundreds of thousands of tokens."""
        buffer, size, offset, unpack = self.buffer, self.size, self.offset, _LENGTH.unpack_from
        found = []
        for index in range(count):
            if size - offset < 8:
                raise ValueError(f"{shown(key)} ends at item {index} of {count}")
            (length,) = unpack(buffer, offset)
            offset += 8
            if length > size - offset:
                raise ValueError(
                    f"item {index} of {shown(key)} claims {length} bytes, the file has "
                    f"{size - offset} left"
                )
            try:
                found.append(str(buffer[offset : offset + length], "utf-8"))
            except UnicodeDecodeError:
                raw = bytes(buffer[offset : offset + min(length, 100)])
                raise ValueError(
                    f"item {index} of {shown(key)} is not UTF-8: {shown(repr(raw))}"
                ) from None
            offset += length
        self.offset = offset
        return found

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read one tensor's name, shape in NumPy's order, type and offset."""
        name = self.text("the name of a tensor", MAX_NAME)
        if not name or not name.isprintable():
            raise ValueError(f"{shown(repr(name))} is no name for a tensor")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        if not all(1 <= extent <= _MAX_EXTENT for extent in shape):
            raise ValueError(f"tensor {name} has absurd shape {shown(list(shape))}")
        return name, shape, self.number("<I"), self.number("<Q")

    def _check_count(self, count: int, what: str, limit: int, width: int) -> None:
        if count > limit:
            raise ValueError(f"it claims {count} {what}, at most {limit} are read")
        self._check_left(count * width, f"{count} {what}")

    def _check_left(self, needed: int, what: str) -> None:
        left = self.size - self.offset
        if needed > left:
            raise ValueError(f"{shown(what)} needs {needed} bytes, the file has {left} left")


_LENGTH = struct.Struct("<Q")


def _alignment(metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not 8 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise ValueError(f"general.alignment is {shown(repr(value))}")
    return value


def _place(
    path: Path,
    entries: Sequence[tuple[str, tuple[int, ...], int, int]],
    *,
    start: int,
    alignment: int,
    size: int,
) -> dict[str, GGUFTensor]:
    """Check that the tensors follow each other, each at the next aligned byte, within the file."""
    tensors: dict[str, GGUFTensor] = {}
    expected = 0
    for name, shape, number, offset in entries:
        if name in tensors:
            raise ValueError(f"tensor {name} comes twice")
        try:
            kind = Type(number)
        except ValueError:
            raise ValueError(f"tensor {name} has unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(
                f"tensor {name} has rows of {shape[-1]}, {kind.name} needs multiples of {block}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if offset != expected:
            raise ValueError(f"tensor {name} begins at byte {offset} of the data, not {expected}")
        if start + offset + num_bytes > size:
            raise ValueError(
                f"tensor {name} ends at byte {start + offset + num_bytes}, the file at {size}"
            )
        tensors[name] = GGUFTensor(
            path=path, name=name, type=kind, shape=shape, start=start + offset, num_bytes=num_bytes
        )
        expected = -(-(offset + num_bytes) // alignment) * alignment
    return tensors
