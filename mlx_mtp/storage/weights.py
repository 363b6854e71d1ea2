"""Which files of a folder are a model's weights."""

from __future__ import annotations

import contextlib
import glob
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from mlx_mtp.storage.safetensors import (
    check_safetensors,
    read_index,
    read_weight_map,
    safe_member,
)

SAFETENSORS, SAFETENSORS_INDEX = "model*.safetensors", "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def safetensors_files(folder: Path, *, dropped: Callable[[str], bool] | None = None) -> list[Path]:
    """Return a model's safetensors files, chosen as transformers does: one may be outdated.

    Args:
        folder: the model's folder.
        dropped: whether mlx-lm drops a tensor; a shard for which the index lists only such tensors
            may be missing.

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
    absent: set[str] = set()
    if index.is_file():
        weight_map = read_weight_map(index)
        files = set(weight_map.values())
        if dropped is not None and (gone := {n for n in files if not (folder / n).is_file()}):
            absent = gone - {file for name, file in weight_map.items() if not dropped(name)}
        for name in sorted(files - absent):
            try:
                safe_member(folder, name)
            except ValueError as error:
                raise ValueError(f"{index}: {error}") from None
        found = [folder / name for name in sorted(files - absent)]
    return complete(folder, found, absent=absent)


def listed_tensors(folder: Path, *, extra: str) -> dict[str, Path]:
    """Return the file of each tensor in a model folder, which is missing if only the index has it.

    The headers of an indexed model's own files are not read.

    Args:
        folder: the model's folder.
        extra: pattern of more files, which the index may leave out.

    Raises:
        ValueError: the index or a header is broken.
    """
    index, whole = folder / SAFETENSORS_INDEX, folder / _WHOLE
    files, places = set(folder.glob(extra)), dict[str, Path]()
    if index.is_file():
        places = {name: folder / file for name, file in read_weight_map(index).items()}
    if not places or (whole.is_file() and whole not in places.values()):  # an outdated index
        places, files = {}, files | set(safetensors_files(folder))
    for path in sorted(files - set(places.values())):
        places |= dict.fromkeys(check_safetensors(path), path)
    return places


def complete(folder: Path, files: list[Path], *, absent: Collection[str] = ()) -> list[Path]:
    """Refuse shards if, by their names, others are missing that are not known to be absent."""
    names = {path.name for path in files} | set(absent)
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
