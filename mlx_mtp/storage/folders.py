"""Folders that appear whole or not at all.

A model or adapter folder is written in a hidden workplace beside its place and renamed into it, so
that a reader never meets half of one and a failure leaves nothing behind.  A process that is killed
cannot tidy up: its workplace is removed by the next one that writes the same folder, which knows by
a file lock that nobody works there any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK, _NEW, _OLD, _DONE = "lock", "new", "old", "done"


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an error.

    Missing parents of ``target`` are made.  With ``replace`` an existing ``target`` is moved aside
    first and removed last, so it comes back if the rename fails.

    Raises:
        FileExistsError: ``target`` exists and ``replace`` is off.
        OSError: the folder cannot be made or renamed.
    """
    target = Path(os.path.abspath(target))  # whose name holds even if the folder itself is moved
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    if not replace and os.path.lexists(target):
        raise FileExistsError(f"{target} already exists")
    with _workplace(target) as workplace:
        # Inside a private folder, so that the new one gets the ordinary mode and not mkdtemp's.
        draft = workplace / _NEW
        draft.mkdir()
        yield draft
        _publish(draft, target, aside=workplace / _OLD if replace else None)


@contextlib.contextmanager
def without_wildcards(folder: Path) -> Iterator[Path]:
    """Yield a folder with the same files whose path means itself to ``glob``.

    mlx-lm globs for weights in the path as it is given, so brackets in it would hide them.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-") as name:
        for path in folder.iterdir():
            (Path(name) / path.name).symlink_to(path.resolve())
        yield Path(name)


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A private folder beside ``target``, locked as long as this process works in it."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
        try:
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:  # swept while it was still empty
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():  # else another process swept it before the lock
            break
        os.close(lock)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _sweep(target: Path) -> None:
    """Remove the workplaces of processes that were killed; bring back what they had moved aside."""
    for folder in target.parent.iterdir():
        if not folder.name.startswith(_prefix(target)):
            continue
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()  # killed before it was locked: empty
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody works there
            if os.path.lexists(folder / _OLD) and not os.path.lexists(target):
                os.rename(folder / _OLD, target)
            _remove(folder)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a workplace, its lock last: without one, nobody would sweep up what is left."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.mlx-mtp-"


def _publish(draft: Path, target: Path, *, aside: Path | None) -> None:
    """Rename ``draft`` to ``target``; what stands there goes to ``aside`` when that is given."""
    moved = aside is not None and os.path.lexists(target)
    if aside is not None and moved:
        os.rename(target, aside)
    try:
        if os.path.lexists(target):  # rename alone would silently take an empty folder's place
            raise FileExistsError(f"{target} already exists")
        os.rename(draft, target)
    except OSError:
        if aside is not None and moved:
            os.rename(aside, target)
        raise
    if aside is not None and moved:
        # From here on it must never come back: it is about to be removed, bit by bit.
        os.rename(aside, aside.with_name(_DONE))
