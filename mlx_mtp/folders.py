"""Folders that appear whole or not at all.

A model or adapter folder is written beside its place and renamed into it, so that a reader never
meets half of one and a failure leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an error.

    Missing parents of ``target`` are made.  With ``replace`` an existing ``target`` is moved aside
    first and removed last, so it comes back if the rename fails.

    Raises:
        FileExistsError: ``target`` exists and ``replace`` is off.
        OSError: the folder cannot be made or renamed.
    """
    if not replace and os.path.lexists(target):
        raise FileExistsError(f"{target} already exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside a private folder, so that the new one gets the ordinary mode and not mkdtemp's 0700.
    workplace = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        draft = workplace / "new"
        draft.mkdir()
        yield draft
        _publish(draft, target, aside=workplace / "old" if replace else None)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


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
