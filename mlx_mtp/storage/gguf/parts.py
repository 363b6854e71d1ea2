"""Which files are GGUF files, and which belong together; nothing but names and magic is read."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_mtp.storage.gguf import SUFFIX
from mlx_mtp.storage.safetensors import open_regular

_PART = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF file."""
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def part_paths(path: Path) -> list[Path]:
    """Return all files of a split model, by the name of one; the file itself if it is whole.

    Raises:
        ValueError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    parts = [
        path.with_name(f"{match[1]}{number:05d}-of-{match[3]}{SUFFIX}")
        for number in range(1, int(match[3]) + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{path} is one part of {len(parts)}: {part.name} is missing")
    return parts


def is_part(path: Path, count: int) -> bool:
    """Whether a file's name is that of one part of so many."""
    match = _PART.fullmatch(path.name)
    return match is not None and int(match[3]) == count


def gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, of each split one the first part."""
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and is_gguf(path))
    parts = {path: _PART.fullmatch(path.name) for path in found}
    return [path for path, match in parts.items() if match is None or int(match[2]) == 1]
