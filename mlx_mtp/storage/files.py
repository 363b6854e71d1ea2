"""Files that are written completely or not at all, and files that grow by complete lines."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_DRAFT = re.compile(r"\..+\.\d+")  # see ``write_atomically``


def lock_file(descriptor: int, *, path: Path) -> None:
    """Lock an open file exclusively, where the file system supports locks.

    The data file itself is locked, so a killed process leaves neither a lock nor a lock file.

    Raises:
        ValueError: another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another process") from None
    except OSError:
        pass  # a file system without locks


def append_line(descriptor: int, values: Mapping[str, Any], *, path: Path) -> None:
    """Append a JSON line to an open file and flush it to disk.

    Raises:
        OSError: the disk is full; the file is unchanged.
    """
    line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):  # a nearly full disk takes a part without complaint
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except BaseException as error:
        os.ftruncate(descriptor, size)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_atomically(
    path: Path, content: str | Iterable[bytes | memoryview], *, mode: int = 0o666
) -> None:
    """Write a file completely or not at all.

    Args:
        path: the file.
        content: text, or pieces of bytes.
        mode: permissions of the file, before the process's umask.

    Raises:
        OSError: it cannot be written; an earlier file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    pieces = [content.encode()] if isinstance(content, str) else content
    try:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()  # of a killed process with the same number
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def remove_drafts(folder: Path) -> None:
    """Remove what killed calls of ``write_atomically`` left; no other process may write there."""
    for path in folder.iterdir():
        if _DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def hash_weights(folder: Path | None) -> dict[str, str]:
    """sha256 of a folder's weights and configuration, by file name; empty without a folder."""
    hashes = {}
    for path in sorted(folder.iterdir()) if folder else ():
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json"):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
