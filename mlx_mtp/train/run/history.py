"""The history of a run: a JSONL file with one line for each report and evaluation.

A run holds its history as long as it trains, so a second process cannot write the same folder.
A line is written whole or not at all; what a crash left of the last one is cut off.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_mtp.storage.files import append_line, lock_file


class History:
    """Appends records to a history file that it holds alone.

    Args:
        path: the file; made with its parents when it is not there.
        keep: how many lines to keep, those that the resumed state knows of; None keeps all.

    Attributes:
        records: what the file holds.

    Raises:
        ValueError: another process writes the file, or a line in it is not a JSON object.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, keep: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            lock_file(self._file, path=path)
            lines = path.read_bytes().splitlines(keepends=True)
            lines = [line for line in lines if line.endswith(b"\n")][:keep]
            self.records = [_record(line, path, number) for number, line in enumerate(lines, 1)]
            os.ftruncate(self._file, sum(map(len, lines)))
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Write one line, to the disk and not only to the system's memory.

        Raises:
            OSError: there is no room; the file is as it was before.
        """
        append_line(self._file, record, path=self.path)
        self.records.append(record)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __len__(self) -> int:
        return len(self.records)

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a history file without holding it; a torn last line is left out.

    Raises:
        ValueError: a line is not a JSON object.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_record(line, path, number) for number, line in enumerate(lines, start=1)]


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: not a JSON object")
    return record
