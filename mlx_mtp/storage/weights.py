"""Which files of a folder are a model's weights."""

from __future__ import annotations

import contextlib
import glob
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_mtp.storage.safetensors import read_index

SAFETENSORS, SAFETENSORS_INDEX = "model*.safetensors", "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def safetensors_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files, chosen as transformers does: one may be outdated.

    Raises:
        ValueError: the index is broken, or a shard is missing.
    """
    found = sorted(path for path in folder.glob(SAFETENSORS) if path.is_file())
    index, whole = folder / SAFETENSORS_INDEX, folder / _WHOLE
    if whole in found and (index.is_file() or all(map(_shard, set(found) - {whole}))):
        try:
            names = set(read_index(index).values())
        except (ValueError, OSError):
            names = set()  # of files that are gone
        if _WHOLE not in names:
            return [whole]
    if index.is_file():
        found = [folder / name for name in sorted(set(read_index(index).values()))]
    return complete(folder, found)


def complete(folder: Path, files: list[Path]) -> list[Path]:
    """Refuse shards if, by their names, others are missing."""
    names = {path.name for path in files}
    for match in filter(None, map(_shard, files)):
        for number in range(1, int(match[3]) + 1):
            shard = f"{match[1]}{number:05d}-of-{match[3]}{match[4]}"
            if shard not in names:
                raise ValueError(f"{folder} is incomplete: {shard} is missing")
    return files


def _shard(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)", path.name)


@contextlib.contextmanager
def for_mlx_lm(folder: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder in which mlx-lm finds these weights: the model's own one, or one of links.

    mlx-lm reads all files that match, and looks for them by ``glob`` without escaping the path, so
    brackets in it would hide them.
    """
    if glob.escape(str(folder)) == str(folder) and set(files) == set(folder.glob(SAFETENSORS)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-") as name:
        for path in folder.iterdir():
            if not path.match(SAFETENSORS):
                (Path(name) / path.name).symlink_to(path.resolve())
        for number, path in enumerate(files):
            (Path(name) / f"model-{number}.safetensors").symlink_to(path.resolve())
        yield Path(name)
