"""A JSONL file that one process appends to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from mlx_mtp.storage.files import append_line, lock_file

Item = TypeVar("Item")


class LineFile(Generic[Item]):
    """A locked JSONL file; use it as a context.

    A line is written completely or not at all.  An incomplete last line, left by a crash, is
    removed when the file is opened.

    Args:
        path: the file; it and its parents are created if missing.
        parse: makes the items of the file's content.
        keep: number of lines to keep; None keeps all.

    Attributes:
        records: the items in the file.

    Raises:
        ValueError: another process has locked the file, or ``parse`` raised.
        OSError: the file cannot be opened.
    """

    def __init__(
        self, path: Path, parse: Callable[[bytes], list[Item]], *, keep: int | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            lock_file(self._file, path=path)
            lines = path.read_bytes().split(b"\n")[:-1][:keep]
            data = b"".join(line + b"\n" for line in lines)
            self.records = parse(data)
            os.ftruncate(self._file, len(data))
        except BaseException:
            os.close(self._file)
            raise

    def _append(self, values: Mapping[str, Any], item: Item) -> None:
        """Write a line and sync it to the disk.

        Raises:
            OSError: the disk is full; the file is unchanged.
        """
        append_line(self._file, values, path=self.path)
        self.records.append(item)

    def close(self) -> None:
        """Close and unlock the file; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __len__(self) -> int:
        return len(self.records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
