"""Folders that are written atomically.

A model or adapter folder is written in a hidden temporary folder next to its target and then
renamed, so that readers never see an incomplete folder and a failure leaves nothing.  A process
that is killed cannot clean up: its temporary folder is removed by the next process that writes the
same target, after a file lock shows that it is no longer in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK, _NEW, _OLD, _DONE = "lock", "new", "old", "done"


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an error.

    Missing parents of ``target`` are created.  With ``replace`` an existing ``target`` is moved
    aside first and removed last, so that it is restored if the rename fails.

    Raises:
        FileExistsError: ``target`` exists and ``replace`` is off.
        OSError: the folder cannot be created or renamed.
    """
    target = Path(os.path.abspath(target))  # stays valid if the working directory is moved
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    if not replace and os.path.lexists(target):
        raise FileExistsError(f"{target} already exists")
    with _temporary_folder(target) as temporary:
        # Inside the temporary folder, so that it gets the ordinary mode and not mkdtemp's.
        draft = temporary / _NEW
        draft.mkdir()
        yield draft
        _publish(draft, target, aside=temporary / _OLD if replace else None)


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a private folder next to ``target``, locked while it is in use."""
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
    """Remove temporary folders of killed processes; restore what they had moved aside."""
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is in use
            if os.path.lexists(folder / _OLD) and not os.path.lexists(target):
                os.rename(folder / _OLD, target)
            _remove(folder)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a temporary folder; the lock goes last, because ``_sweep`` needs it to continue."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.mlx-mtp-"


def _publish(draft: Path, target: Path, *, aside: Path | None) -> None:
    """Rename ``draft`` to ``target``; an existing ``target`` is moved to ``aside``, if any."""
    moved = aside is not None and os.path.lexists(target)
    if aside is not None and moved:
        os.rename(target, aside)
    try:
        if os.path.lexists(target):  # rename would silently replace an empty folder
            raise FileExistsError(f"{target} already exists")
        os.rename(draft, target)
    except OSError:
        if aside is not None and moved:
            os.rename(aside, target)
        raise
    if aside is not None and moved:
        # It must not be restored from here on, because it is about to be removed file by file.
        os.rename(aside, aside.with_name(_DONE))
