"""GGUF files as model folders in the cache, converted when they are first used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from mlx_mtp.storage.gguf import WRITER_VERSION
from mlx_mtp.storage.gguf.parts import part_paths
from mlx_mtp.storage.paths import cache_dir
from mlx_mtp.storage.prepared import is_complete, prepare

_HEAD_BYTES = 1 << 20


def gguf_model_path(
    path: Path,
    *,
    check: Callable[[Path], object] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return the model folder of a GGUF file; the first call converts it into the cache.

    A file is known by its size, its time and its first MiB, so a changed file is converted anew.

    Args:
        path: the file, or one part of a split one.
        check: called with the written folder before it is put in place; may raise ValueError.
        progress: called with lines for the user while the folder is written.

    Raises:
        ValueError: the file cannot be converted, or the cache cannot be written.
    """
    identity = _identity(path)
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    folder = cache_dir() / "gguf" / f"{_name(path)}-{digest}"
    key = {"gguf": identity, "writer_version": WRITER_VERSION}
    if is_complete(folder, key):
        return folder
    # Only a first use needs these, and PyPI's gguf takes a third of a second to import.
    from mlx_mtp.storage.gguf.card import write_card
    from mlx_mtp.storage.gguf.convert import write_model
    from mlx_mtp.storage.gguf.file import read_gguf

    file = read_gguf(path)
    line = f"Converting {path.name} for MLX (once, in {folder})"

    def write(draft: Path) -> None:
        result = write_model(file, draft, written=_percentages(progress, line, file.num_bytes))
        write_card(draft, file, result)
        if check is not None:
            check(draft)

    return prepare(
        folder,
        key,
        write,
        what=path.name,
        num_bytes=file.num_bytes,
        announce=None if progress is None else lambda: progress(f"{line} ..."),
    )


def _identity(path: Path) -> list[list[int | str]]:
    """Return size, time and hash of the beginning of each part of a file."""
    found: list[list[int | str]] = []
    for part in part_paths(path):
        try:
            status = part.stat()
            with part.open("rb") as file:
                head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
        except OSError as error:
            raise ValueError(f"{part} cannot be read: {error.strerror or error}") from None
        found.append([status.st_size, status.st_mtime_ns, head])
    return found


def _name(path: Path) -> str:
    return re.sub(r"[^\w.-]", "_", path.stem)[:80].lstrip(".") or "model"


def _percentages(
    progress: Callable[[str], None] | None, line: str, total: int
) -> Callable[[int], object] | None:
    """Return a callback for sizes that reports every tenth of the total."""
    if progress is None:
        return None
    done = shown = 0

    def written(size: int) -> None:
        nonlocal done, shown
        done += size
        if (tenths := min(10 * done // total, 9)) > shown:
            shown = tenths
            progress(f"{line}: {10 * tenths}% ...")

    return written
