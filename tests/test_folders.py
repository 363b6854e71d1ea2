"""Folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_mtp.folders import new_folder


def test_writes_a_folder_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as draft:
        (draft / "x").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert (target / "x").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], replace: bool
) -> None:
    target = tmp_path / "b"
    if replace:
        target.mkdir()
        (target / "x").write_text("old")
    with pytest.raises(error), new_folder(target, replace=replace) as draft:
        (draft / "x").write_text("new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == (["b"] if replace else [])
    assert not replace or (target / "x").read_text() == "old"


def test_replaces_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "b"
    target.mkdir()
    with pytest.raises(FileExistsError), new_folder(target):
        pytest.fail("must not begin")
    with new_folder(target, replace=True) as draft:
        (draft / "x").write_text("new")
    assert (target / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("empty", [False, True])
def test_gives_way_to_a_folder_that_appeared_meanwhile(tmp_path: Path, empty: bool) -> None:
    target = tmp_path / "b"
    with pytest.raises(FileExistsError), new_folder(target) as draft:
        (draft / "x").write_text("mine")
        target.mkdir()
        if not empty:
            (target / "x").write_text("theirs")
    assert [path.name for path in target.iterdir()] == ([] if empty else ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_brings_the_old_folder_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b"
    target.mkdir()
    (target / "x").write_text("old")
    rename = os.rename

    def failing(source: Path, destination: Path) -> None:
        if source.name == "new":
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), new_folder(target, replace=True):
        pass
    assert (target / "x").read_text() == "old"
