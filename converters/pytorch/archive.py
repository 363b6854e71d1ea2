"""What a PyTorch file is, found out from its bytes alone: nothing in it is run or unpickled.

Two forms are known, the zip archive that ``torch.save`` writes now and the row of pickles that it
wrote before version 1.6.  The zip is read strictly: entries stored as they are, in one unbroken
row from the first byte to the directory, named once, under one top folder.  Bombs, overlaps and
names that two readers may take differently are therefore refused.  The pickle must build plain
weights that lie in the file (``torch_pickle``).  What passes is still read in the sandbox alone.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.converters.pytorch.pickle import PickleFacts, check_pickle, named_globals
from mlx_mtp.converters.pytorch.reader import MAX_GROWTH
from mlx_mtp.storage.safetensors import open_regular, shown

MAX_PICKLE_BYTES = 64 << 20
MAX_ENTRIES = 250_000

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5  # magic, protocol, machine, the object, the storages' keys
_ZIP_START = b"PK\x03\x04"
_END, _END64, _LOCATOR64 = (struct.Struct(f) for f in ("<4s4H2IH", "<4sQ2H2I4Q", "<4sIQI"))
_ENTRY, _LOCAL = (struct.Struct(f) for f in ("<4s6H3I5H2I", "<4s5H3I2H"))
_ZIP64_FIELD = 1
_REFUSED_FLAGS = 0x2041  # encrypted, strongly encrypted, directory encrypted
_MAX_GAP = 24  # a data descriptor may follow an entry's bytes
_ALL16, _ALL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """What the bytes of a PyTorch file say.

    Attributes:
        is_zip: whether it is a zip archive; else it is the older row of pickles.
        num_bytes: its size.
        globals: the globals that its pickles name, sorted.
    """

    is_zip: bool
    num_bytes: int
    globals: tuple[str, ...]


def check_torch_file(path: Path) -> TorchFile:
    """Refuse a PyTorch file that is more than plain weights; nothing in it is run.

    Raises:
        ValueError: the file is missing, broken, a bomb, or refers to code; one line.
    """
    with _refusals_of(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(4) == _ZIP_START
        facts = _check_zip(file, size) if is_zip else _check_legacy(file, size)
        if not facts.is_dict:
            raise ValueError("it holds no dict of tensors")
        if facts.tensor_bytes > MAX_GROWTH * size:
            raise ValueError(
                f"its tensors would fill {facts.tensor_bytes} bytes, the file has {size}"
            )
        return TorchFile(is_zip=is_zip, num_bytes=size, globals=tuple(sorted(facts.globals)))


def pickle_globals(path: Path) -> list[str]:
    """Return the globals that a PyTorch file's pickles name, sorted; nothing in it is run.

    Raises:
        ValueError: the file is missing, broken, or no PyTorch file.
    """
    with _refusals_of(path), open_regular(path) as file:
        if file.read(4) == _ZIP_START:
            records = _zip_records(file, os.fstat(file.fileno()).st_size)
            return sorted(set(named_globals(_zip_pickle(file, records))[0]))
        head, end = _legacy_head(file)
        found: set[str] = set()
        for _ in range(_LEGACY_PICKLES - 1):
            names, end = named_globals(head, start=end)
            found.update(names)
        return sorted(found)


@contextlib.contextmanager
def _refusals_of(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is refused: {shown(error)}") from None


# The form from before version 1.6: five pickles, then each storage behind its length


def _legacy_head(file: Any) -> tuple[bytes, int]:
    """Return the part with the pickles, and where the first one, the magic number, ends."""
    head = os.pread(file.fileno(), MAX_PICKLE_BYTES, 0)
    try:
        facts, end = check_pickle(head[:64])
    except ValueError:
        facts, end = None, 0
    if facts is None or facts.result != _LEGACY_MAGIC:
        raise ValueError("it is neither a zip archive nor an old PyTorch file")
    return head, end


def _check_legacy(file: Any, size: int) -> PickleFacts:
    head, end = _legacy_head(file)
    _, end = check_pickle(head, start=end)  # the protocol
    _, end = check_pickle(head, start=end)  # the machine
    facts, end = check_pickle(head, start=end)
    keys, end = check_pickle(head, start=end)
    entries = keys.result if isinstance(keys.result, list) else []
    listed = [key for key in entries if isinstance(key, str)]
    if sorted(listed) != sorted(facts.storages):
        raise ValueError("its list of storages is not that of its tensors")
    for key in listed:
        storage = facts.storages[key]
        if _read_at(file, end, 8) != struct.pack("<Q", storage.count):
            raise ValueError(f"its storage {shown(key)} has another length than its tensors say")
        end += 8 + storage.num_bytes
    if end != size:
        raise ValueError(f"its storages end at byte {end}, the file at {size}")
    return facts


# Zip archives


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    offset: int  # of its local header
    num_bytes: int


def _check_zip(file: Any, size: int) -> PickleFacts:
    records = _zip_records(file, size)
    text = _zip_pickle(file, records)
    facts, end = check_pickle(text)
    if end != len(text):
        raise ValueError(f"{len(text) - end} bytes follow its pickle")
    for key, storage in facts.storages.items():
        if f"data/{key}" not in records:
            raise ValueError(f"its storage {shown(key)} is missing")
        if storage.num_bytes > records[f"data/{key}"][1]:
            raise ValueError(f"its storage {shown(key)} is shorter than its tensors say")
    return facts


def _zip_pickle(file: Any, records: Mapping[str, tuple[int, int]]) -> bytes:
    if "data.pkl" not in records:
        raise ValueError("it is a zip archive without data.pkl")
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise ValueError("it is a TorchScript program, not a checkpoint")
    start, length = records["data.pkl"]
    if length > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {length} bytes, at most {MAX_PICKLE_BYTES} are read")
    return _read_at(file, start, length)


def _zip_records(file: Any, size: int) -> dict[str, tuple[int, int]]:
    """Check the whole archive; return where each record's bytes begin and how many there are."""
    count, start, end = _find_directory(file, size)
    entries = sorted(_read_directory(file, count, start, end), key=lambda entry: entry.offset)
    roots = {entry.name.partition("/")[0] for entry in entries}
    if len(roots) != 1:
        raise ValueError(f"its entries lie under {len(roots)} folders, not one")
    if len({entry.name.lower() for entry in entries}) != len(entries):
        raise ValueError("two of its entries have one name")
    previous_end = 0
    records: dict[str, tuple[int, int]] = {}
    for index, entry in enumerate(entries):
        if not 0 <= entry.offset - previous_end <= (_MAX_GAP if index else 0):
            raise ValueError(f"its entry {entry.name} overlaps another or leaves a gap")
        data = _data_start(file, entry)
        previous_end = data + entry.num_bytes
        records[entry.name.partition("/")[2]] = (data, entry.num_bytes)
    if not 0 <= start - previous_end <= _MAX_GAP:
        raise ValueError("its last entry overlaps its directory or leaves a gap")
    return records


def _find_directory(file: Any, size: int) -> tuple[int, int, int]:
    """Return how many entries there are, and where their directory begins and ends."""
    at = size - _END.size
    mark, disk, first, here, count, length, start, comment = _unpack(_END, file, at)
    if mark != b"PK\x05\x06" or comment:
        raise ValueError("it is a broken or truncated zip archive")
    small = (here, count, length, start)
    try:
        found, first_disk, at64, disks = _unpack(_LOCATOR64, file, at - _LOCATOR64.size)
    except ValueError:
        found, first_disk, at64, disks = b"", 0, 0, 1
    if found == b"PK\x06\x07":
        if at64 != at - _LOCATOR64.size - _END64.size or first_disk or disks != 1:
            raise ValueError("its zip64 directory is not where it must be")
        mark, rest, _, _, disk, first, here, count, length, start = _unpack(_END64, file, at64)
        if mark != b"PK\x06\x06" or rest != _END64.size - 12:
            raise ValueError("its zip64 directory is broken")
        for wide, narrow, full in zip((here, count, length, start), small, _SATURATED, strict=True):
            if narrow not in (wide, full):
                raise ValueError("its two zip directories differ")
        at = at64
    if disk or first or here != count or start + length != at or not 0 < count <= MAX_ENTRIES:
        raise ValueError("its zip directory is broken or absurd")
    return count, start, at


_SATURATED = (_ALL16, _ALL16, _ALL32, _ALL32)


def _read_directory(file: Any, count: int, start: int, end: int) -> Iterator[_Entry]:
    """Yield the entries that the directory lists."""
    if end - start > MAX_PICKLE_BYTES:
        raise ValueError(f"its zip directory has {end - start} bytes")
    text, at = _read_at(file, start, end - start), 0
    for _ in range(count):
        if at + _ENTRY.size > len(text):
            raise ValueError("its zip directory is cut off")
        fields = _ENTRY.unpack_from(text, at)
        flags, method, packed, num_bytes = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment, disk, offset = *fields[10:14], fields[16]
        name_end = at + _ENTRY.size + name_length
        name = _entry_name(text[at + _ENTRY.size : name_end])
        extra = text[name_end : name_end + extra_length]
        num_bytes, packed, offset = _widen(extra, (num_bytes, packed, offset))
        if fields[0] != b"PK\x01\x02" or disk or comment or flags & _REFUSED_FLAGS:
            raise ValueError(f"its entry {name} is broken or encrypted")
        if method != 0 or packed != num_bytes:
            raise ValueError(f"its entry {name} is compressed, which torch.save never does")
        yield _Entry(name=name, offset=offset, num_bytes=num_bytes)
        at = name_end + extra_length
    if at != len(text):
        raise ValueError("its zip directory has bytes left over")


def _entry_name(text: bytes) -> str:
    """Decode a name, refusing what is no plain path of two parts or more."""
    name = text.decode()
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and len(name) <= 1024
    if not plain or len(parts) < 2 or {"", ".", ".."} & set(parts):
        raise ValueError(f"its entry {shown(repr(name))} has no plain name")
    return name


def _widen(extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Take the sizes and the offset that do not fit in 32 bits from the zip64 field."""
    wide: bytes | None = None
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_FIELD:
            if wide is not None:
                raise ValueError("an entry has two zip64 fields")
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    needed = sum(value == _ALL32 for value in values)
    if not needed:
        return values
    if wide is None or len(wide) < 8 * needed:
        raise ValueError("an entry lacks its zip64 field")
    numbers = iter(struct.unpack_from(f"<{needed}Q", wide))
    first, second, third = (next(numbers) if value == _ALL32 else value for value in values)
    return first, second, third


def _data_start(file: Any, entry: _Entry) -> int:
    """Check the header before an entry's bytes and return where they begin."""
    fields = _unpack(_LOCAL, file, entry.offset)
    mark, flags, method, name_length, extra_length = *fields[:1], *fields[2:4], *fields[9:]
    name = _read_at(file, entry.offset + _LOCAL.size, name_length)
    if mark != _ZIP_START or method != 0 or flags & _REFUSED_FLAGS or name != entry.name.encode():
        raise ValueError(f"its entry {entry.name} does not match the zip directory")
    return entry.offset + _LOCAL.size + name_length + extra_length


def _unpack(form: struct.Struct, file: Any, at: int) -> tuple[Any, ...]:
    return form.unpack(_read_at(file, at, form.size))


def _read_at(file: Any, at: int, length: int) -> bytes:
    """Read exactly these bytes."""
    if at < 0:
        raise ValueError("it is cut off")
    text = os.pread(file.fileno(), length, at)
    if len(text) != length:
        raise ValueError("it is cut off")
    return text
