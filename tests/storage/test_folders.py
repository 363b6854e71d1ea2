"""Folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mtp.storage.folders import new_folder


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


_KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_mtp.storage.folders import new_folder
rename = os.rename
def die_before(source, target):
    if sys.argv[2] == source.name:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = die_before
with new_folder(Path(sys.argv[1]), replace=True) as draft:
    (draft / "x").write_text("new")
"""


@pytest.mark.parametrize("moment", ["[b]", "new"])  # before the old one is aside, and after
def test_sweeps_up_after_a_killed_process(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "[b]"
    target.mkdir()
    (target / "x").write_text("old")
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(target), moment])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == (2 if moment == "[b]" else 1)
    with pytest.raises(FileExistsError), new_folder(target):
        pytest.fail("the old folder is back")
    assert (target / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["[b]"]


def test_leaves_the_workplace_of_others_alone(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with new_folder(target) as first:
        (first / "x").write_text("first")
        with new_folder(target) as second:
            (second / "x").write_text("second")
            assert (first / "x").read_text() == "first"
        target.rename(tmp_path / "c")
    assert (target / "x").read_text() == "first"
    assert (tmp_path / "c" / "x").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_a_process_killed_while_it_tidies_up_is_swept_too(tmp_path: Path) -> None:
    """What was replaced is gone for good once the new folder stands, however little of it is."""
    target = tmp_path / "b"
    target.mkdir()
    (target / "x").write_text("old")
    script = _KILLED.replace("os.rename = die_before", "").replace(
        "rename = os.rename",
        "import shutil\n"
        "shutil.rmtree = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)",
        1,
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target), ""])
    assert killed.returncode == -signal.SIGKILL
    assert (target / "x").read_text() == "new" and len(list(tmp_path.iterdir())) == 2
    (target / "x").unlink()
    target.rmdir()
    with new_folder(target):
        assert [path.name for path in tmp_path.iterdir() if path.name == "b"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
