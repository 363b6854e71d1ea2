"""Blocks of kept beginnings as safetensors files, one per block, which survive a restart.

A file has the keys and values of one block, all ids of its text from the beginning, the key of
what computed it, and a checksum.  All of these are compared when it is read, so that a damaged,
foreign or misplaced file is never used.  Several processes may use one folder: files appear under
their names complete, writers take turns, and readers need no lock.

Nothing here calls MLX, except ``to_rows``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout

from mlx_mtp.model.caches.blocks import Rows, Signature, is_state, own_shape
from mlx_mtp.storage.files import remove_drafts, write_atomically
from mlx_mtp.storage.safetensors import read_raw_tensors, safetensors_header, shown
from mlx_mtp.terminal import show

FORMAT = "mlx-mtp prompt cache 1"
LOCK_S = 5.0  # how long a writer waits for another process
_LOCK_FILE = ".lock"
_FOLDER = re.compile(r"[0-9a-f]{24}")
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_MAX_HEADER_BYTES = 1 << 20
_DTYPES = {
    "F32": (mx.float32, np.dtype(np.float32)),
    "F16": (mx.float16, np.dtype(np.float16)),
    "BF16": (mx.bfloat16, np.dtype(np.uint16)),
    "U32": (mx.uint32, np.dtype(np.uint32)),
}
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}

Part = tuple[str, tuple[int, ...], memoryview]
"""Type, shape and bytes of a tensor."""


class UnusableFile(ValueError):
    """A file that is not used: one of another program, model or text, or no file at all."""


class DamagedFile(UnusableFile):
    """A file of ours with damage, which is removed."""


@dataclass(frozen=True)
class StoredBlock:
    """A block that was read from a file.

    Attributes:
        start: position of its first id.
        parts: its tensors.
    """

    start: int
    parts: Mapping[str, Part]

    def to_rows(self) -> Rows:
        """Make MLX arrays; to be called by the thread that calls MLX."""
        rows = {}
        for name, (dtype, shape, data) in self.parts.items():
            kind, numpy_kind = _DTYPES[dtype]
            rows[name] = mx.array(np.frombuffer(data, numpy_kind).reshape(shape)).view(kind)
        mx.eval(rows)
        return rows


class PrefixFiles:
    """The files of one model and its settings, in a folder that other models use too.

    Args:
        folder: the folder of all models.
        key: hash of everything that the rows depend on, in hexadecimal digits.
        signatures: what the tensors of a block look like.
        max_bytes: maximum size of the files of all models; the least recently used are removed.
        block_size: ids per block.
        log: called with a line about a file that is not used or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str,
        signatures: Sequence[Signature],
        max_bytes: int,
        block_size: int,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder / key[:24]
        self.nbytes = 0
        self.num_removed = 0
        self._root = folder
        self._key = key
        self._signatures = [
            {name: (_NAMES[dtype], shape) for name, (dtype, shape) in each.items()}
            for each in signatures
        ]
        self._max_bytes = max_bytes
        self._block_size = block_size
        self._log_line = log or (lambda line: show(line, file=sys.stderr))
        self._logged: set[str] = set()
        self._unusable: set[Path] = set()  # to be replaced
        self._recent: WeakValueDictionary[Path, StoredBlock] = WeakValueDictionary()
        self._lock = threading.Lock()

    def paths(self, ids: Sequence[int]) -> Iterator[Path]:
        """Paths of the files of all whole blocks of a text, whether they exist or not."""
        digest = hashlib.sha256(self._key.encode())
        data = np.array(ids, np.int32)
        for end in range(self._block_size, len(ids) + 1, self._block_size):
            digest.update(data[end - self._block_size : end].tobytes())
            yield self.folder / f"{digest.hexdigest()}.safetensors"

    def read(self, ids: Sequence[int], start: int) -> list[StoredBlock]:
        """Read the blocks of a text from position ``start``, until one is missing.

        A file that cannot be used is reported in a line; a damaged one is removed.
        """
        blocks = []
        for index, path in enumerate(self.paths(ids)):
            if index * self._block_size < start:
                continue
            try:
                end = (index + 1) * self._block_size
                block = self._recent.get(path) or self._read(path, ids[:end])
                self._recent[path] = block
                blocks.append(block)
            except (FileNotFoundError, NotADirectoryError):
                break
            except (OSError, ValueError) as error:
                self._unusable.add(path)
                if isinstance(error, DamagedFile):
                    with contextlib.suppress(OSError):
                        path.unlink()
                self._log(f"{path} is not used: {shown(error)}")
                break
        return blocks

    def has(self, path: Path) -> bool:
        """Whether there is such a file, as far as is known without reading it."""
        return path.is_file() and not path.is_symlink() and path not in self._unusable

    def renew(self, path: Path) -> None:
        """Let the next ``write`` replace a file."""
        self._unusable.add(path)

    def write(self, path: Path, ids: Sequence[int], start: int, rows: Rows) -> bool:
        """Write the block of ``ids`` from ``start``, after making room.

        Returns:
            Whether the file exists now.
        """
        parts: dict[str, Part] = {
            name: (_NAMES[value.dtype], value.shape, memoryview(cast(Any, value)))
            for name, value in rows.items()
        }
        text = np.array(ids, np.int32)
        parts["ids"] = ("I32", text.shape, memoryview(cast(Any, text)))
        metadata = self._metadata(start)
        metadata["sha256"] = _checksum(metadata, parts)
        sizes = {name: (dtype, shape, data.nbytes) for name, (dtype, shape, data) in parts.items()}
        pieces = [safetensors_header(sizes, metadata), *(data for _, _, data in parts.values())]
        size = sum(memoryview(piece).nbytes for piece in pieces)
        try:
            with self._writing():
                if self.has(path):
                    return True
                if self._make_room(size):
                    write_atomically(path, pieces, mode=0o600)
                    self._unusable.discard(path)
                    self.nbytes += size
                    return True
        except (OSError, NotImplementedError) as error:
            self._log(f"prompt cache files cannot be written: {shown(error)}")
        return False

    def mark_used(self, ids: Sequence[int], time_ns: int) -> None:
        """Note when the blocks of a text were used, the first as the latest."""
        for index, path in enumerate(self.paths(ids)):
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time_ns, time_ns - index * 1000), follow_symlinks=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Take the lock of all writers; the folders exist and are private then.

        Raises:
            OSError: there is no such folder, it is not ours, or another process is too slow.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        about = self.folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise OSError(f"{self.folder} is not a folder of this user")
        if about.st_mode & 0o077:
            self.folder.chmod(0o700)
        try:
            with self._lock, FileLock(self._root / _LOCK_FILE, timeout=LOCK_S, mode=0o600):
                yield
        except Timeout:
            raise OSError(f"{self._root / _LOCK_FILE} is taken by another process") from None

    def _make_room(self, size: int) -> bool:
        """Remove the least recently used files until ``size`` more bytes fit."""
        files = []
        for folder in os.scandir(self._root):
            if _FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                remove_drafts(Path(folder.path))  # of killed processes, as others do not write now
                for entry in os.scandir(folder):
                    if _FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        about = entry.stat(follow_symlinks=False)
                        files.append((about.st_mtime_ns, about.st_size, Path(entry.path)))
        self.nbytes = sum(num_bytes for _, num_bytes, _ in files)
        if size > self._max_bytes:
            return False
        for _, num_bytes, path in sorted(files):
            if self.nbytes + size <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            self.nbytes -= num_bytes
            self.num_removed += 1
        return True

    def _read(self, path: Path, ids: Sequence[int]) -> StoredBlock:
        """Read and check one file.

        Raises:
            FileNotFoundError: there is none.
            UnusableFile: it is not a file of this key and these ids.
            DamagedFile: it was, but is damaged.
            OSError: it cannot be read.
        """
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                raise UnusableFile("it is not a regular file of this user")
            if about.st_size > self._max_file_bytes(len(ids)):
                raise DamagedFile(f"it has {about.st_size} bytes, which is too many")
            try:
                metadata, tensors = read_raw_tensors(file)
            except ValueError as error:
                raise DamagedFile(str(error)) from None
        if metadata.get("format") != FORMAT or metadata.get("key") != self._key:
            raise UnusableFile("it is of another version, model or setting")
        parts: dict[str, Part] = {
            name: (info.dtype, info.shape, data) for name, (info, data) in tensors.items()
        }
        if metadata.pop("sha256", None) != _checksum(metadata, parts):
            raise DamagedFile("its checksum is wrong")
        text = parts.pop("ids", ("", (), memoryview(b"")))
        if text[2] != np.array(ids, np.int32).tobytes():
            raise UnusableFile("it is of another text")
        start = len(ids) - self._block_size
        if metadata != self._metadata(start) or not self._fits(parts):
            raise DamagedFile("its tensors are not those of this model")
        return StoredBlock(start, parts)

    def _metadata(self, start: int) -> dict[str, str]:
        return {"format": FORMAT, "key": self._key, "start": str(start)}

    def _fits(self, parts: Mapping[str, Part]) -> bool:
        """Whether the tensors are those of a block of this model."""
        sizes = {name: (dtype, own_shape(name, shape)) for name, (dtype, shape, _) in parts.items()}
        return sizes in self._signatures and all(
            is_state(name) or (len(shape) > 1 and shape[-2] == self._block_size)
            for name, (_, shape, _) in parts.items()
        )

    def _max_file_bytes(self, num_ids: int) -> int:
        """Size that no file of a text of so many ids has."""
        block_bytes = (
            sum(
                _DTYPES[dtype][1].itemsize
                * math.prod(shape)
                * (1 if is_state(name) else self._block_size)
                for name, (dtype, shape) in each.items()
            )
            for each in self._signatures
        )
        return _MAX_HEADER_BYTES + 4 * num_ids + max(block_bytes)

    def _log(self, line: str) -> None:
        """Log a line once."""
        if line not in self._logged:
            self._logged.add(line)
            self._log_line(line)


def _checksum(metadata: Mapping[str, str], parts: Mapping[str, Part]) -> str:
    """Hash of everything in a file, whatever the order of its tensors."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(parts):
        dtype, shape, data = parts[name]
        digest.update(f"{name} {dtype} {tuple(shape)}\n".encode())
        digest.update(data)
    return digest.hexdigest()
