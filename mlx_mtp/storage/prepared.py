"""Folders in the cache that are written once and then reused, by one process at a time."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.storage.folders import new_folder

if TYPE_CHECKING:
    from filelock import FileLock

STAMP_FILE = "mlx_mtp_stamp.json"


def prepare(
    folder: Path,
    key: Mapping[str, Any],
    write: Callable[[Path], None],
    *,
    what: str,
    num_bytes: int,
    announce: Callable[[], None] | None = None,
) -> Path:
    """Return a folder; the first call writes it, later ones find it complete.

    Args:
        folder: in the cache.
        key: what the contents depend on, as JSON values; a folder with another key is replaced.
        write: writes the files into an empty folder.
        what: name of the contents, for messages.
        num_bytes: space that is needed, for messages.
        announce: called before the folder is written.

    Raises:
        ValueError: the folder cannot be written; one line with the reason and the free space.
    """
    if is_complete(folder, key):
        return folder
    try:
        with _lock(folder):  # a second process waits, then finds the folder complete
            if not is_complete(folder, key):
                if announce is not None:
                    announce()
                _write(folder, key, write)
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as RuntimeError
        raise ValueError(_failure(folder, error, what=what, num_bytes=num_bytes)) from None
    return folder


def is_complete(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether a folder was written for this key and all files have their sizes."""
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text(encoding="utf-8"))
        # Additional files in the folder do no harm.
        return stamp["key"] == dict(key) and stamp["bytes"].items() <= _sizes(folder).items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _write(folder: Path, key: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    try:
        with new_folder(folder, replace=not is_complete(folder, key)) as draft:
            write(draft)
            stamp = {"key": dict(key), "bytes": _sizes(draft)}
            text = json.dumps(stamp, indent=2) + "\n"
            (draft / STAMP_FILE).write_text(text, encoding="utf-8")
    except FileExistsError:
        if not is_complete(folder, key):  # otherwise another process wrote it meanwhile
            raise


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size
        for path in folder.iterdir()
        if path.name != STAMP_FILE and path.is_file()
    }


def _lock(folder: Path) -> FileLock:
    from filelock import FileLock  # 50 ms, which only the first start needs

    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock")


def _failure(folder: Path, error: Exception, *, what: str, num_bytes: int) -> str:
    """Describe in one line why a folder cannot be written, with the free space."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    message = f"cannot write {what} to {folder}: {reason.rstrip('.')}"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder.parent).free
        message += f" ({free / 1e6:.0f} MB free, {num_bytes / 1e6:.0f} MB needed)"
    return message
