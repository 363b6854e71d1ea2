"""The history of a run: a JSONL file with one line for each report and each evaluation.

A run locks its history while it trains, so that no second process writes to the same folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mlx_mtp.evaluation.jsonl import check_object, read_lines
from mlx_mtp.train.line_file import LineFile


class History(LineFile[dict[str, Any]]):
    """Appends records to a history file.

    Args:
        path: the file; it and its parents are created if missing.
        keep: number of lines to keep, those that the resumed state knows of; None keeps all.

    Raises:
        ValueError: another process writes to the file, or a line is not a JSON object.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, keep: int | None = None) -> None:
        super().__init__(path, partial(_parse, path=path), keep=keep)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and sync it to the disk.

        Raises:
            OSError: the disk is full; the file is unchanged.
        """
        self._append(record, record)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a history file without locking it; an incomplete last line is ignored.

    Raises:
        ValueError: a line is not a JSON object.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    return _parse(data[: data.rfind(b"\n") + 1], path)


def _parse(data: bytes, path: Path) -> list[dict[str, Any]]:
    return read_lines(data, lambda values, _: check_object(values), name=str(path))
