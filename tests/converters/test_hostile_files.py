"""Hostile and broken checkpoints: each is refused in one line, soon, and nothing in it runs."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import mlx.core as mx
import numpy
import pytest
import torch

from mlx_mtp.converters.checkpoint import read_checkpoint
from mlx_mtp.converters.pytorch import sandbox
from mlx_mtp.converters.pytorch.checkpoint import Request, limits_for
from mlx_mtp.converters.pytorch.file_format import pickle_globals
from tests.converters import hostile, malformed
from tests.converters.torch_zygote import Zygote

pytestmark = pytest.mark.skipif(
    sandbox.why_unavailable() is not None, reason="there is no sandbox here"
)

LIMIT_S = 5.0
# Torch reads these files in spite of their faults.  What it returns are bytes of the file.
READ_ANYWAY = {
    *("protocol 255", "protocol 5", "two pickles in a row", "bytes behind the pickle"),
    *("a storage of absurd length", "a storage of a long number", "a storage of the wrong kind"),
    *("a name upwards", "a name with a backslash", "a folder's entry", "a name in another case"),
    *("bytes behind", "a comment", "a local name that differs", "a method that differs"),
    "a million instructions",  # a slow machine refuses it by the time limit
}


def _refusal(path: Path) -> str | None:
    """Read a checkpoint that must be refused; returns what is wrong with how it was, or None."""
    started = time.monotonic()
    try:
        for tensors in read_checkpoint(path, allow_pickle=True).files.values():
            mx.eval(tensors)
        wrong = "was read"
    except ValueError as error:
        text = str(error)
        wrong = None if "\n" not in text and len(text) < 1000 and path.name in text else repr(text)
    taken_s = time.monotonic() - started
    return wrong if taken_s < LIMIT_S else f"took {taken_s:.1f} s"


def _forms(pickle: bytes) -> dict[str, bytes]:
    return {form: wrap(pickle) for form, wrap in malformed.FORMS.items()}


def _refuse_weapons(folder: Path, *, every: int) -> int:
    """Read every n-th hostile pickle in both forms; returns how many files that were."""
    count = 0
    names = sorted(hostile.weapons(folder / "none", _new(folder, "names")))[::every]
    for name in names:
        for form in malformed.FORMS:
            room = _new(folder, f"{count}")
            weapon = hostile.weapons(room / "canary", _new(room, "needs"))[name]
            path = room / "checkpoint.pt"
            path.write_bytes(malformed.FORMS[form](weapon))
            assert _refusal(path) is None, f"{name}, {form}: {_refusal(path)}"
            assert not os.path.lexists(room / "canary"), f"{name}, {form}: executed"
            count += 1
    return count


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


# Pickles that run something


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_the_hostile_pickles_are_armed_and_the_sandbox_disarms_them(
    tmp_path: Path, zygote: Zygote, every: int
) -> None:
    """A plain unpickler obeys each of them; in the sandbox even that changes nothing outside."""
    names = sorted(hostile.weapons(tmp_path / "none", _new(tmp_path, "names")))
    assert len(names) >= 70
    for way, obeyed in (("armed", True), ("raw", False)):
        for index, name in enumerate(names[::every]):
            room = _new(tmp_path, f"{way}{index}")
            path, canary = room / "pickle", room / "canary"
            path.write_bytes(hostile.weapons(canary, _new(room, "needs"))[name])
            request = Request(
                path=path, scratch=_new(room, "scratch"), is_zip=False, limits=limits_for(1000)
            )
            zygote(request, way=way)
            assert os.path.lexists(canary) == obeyed, f"{name}, {way}"


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_no_hostile_pickle_runs(tmp_path: Path, forked: None, every: int) -> None:
    assert _refuse_weapons(tmp_path, every=every) >= 140 // every


def test_no_hostile_pickle_runs_in_a_fresh_interpreter(tmp_path: Path) -> None:
    weapon = hostile.weapons(tmp_path / "canary", _new(tmp_path, "needs"))["posix.system"]
    (tmp_path / "checkpoint.pt").write_bytes(hostile.zipped(weapon))
    reason = (
        r"checkpoint\.pt cannot be read: it refers to posix\.system, which is not plain weights"
    )
    with pytest.raises(ValueError, match=reason):
        read_checkpoint(tmp_path / "checkpoint.pt", allow_pickle=True)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_cannot_end_the_process_above(tmp_path: Path, zygote: Zygote) -> None:
    target = zygote.process.pid
    weapon = hostile.finish(hostile.call(hostile.named("os", "kill"), target, 9))
    path = tmp_path / "pickle"
    path.write_bytes(weapon)
    request = Request(path=path, scratch=_new(tmp_path, "s"), is_zip=False, limits=limits_for(1))
    assert zygote(request, way="raw") == 3
    assert zygote.process.poll() is None


def test_the_globals_of_a_hostile_pickle_are_named_without_running_it(tmp_path: Path) -> None:
    weapons = hostile.weapons(tmp_path / "canary", _new(tmp_path, "needs"))
    path = tmp_path / "a.pt"
    for name, expected in {
        "os.system": ["os.system"],
        "STACK_GLOBAL": ["os.system"],
        "STACK_GLOBAL from the memo": ["os.system"],
        "INST": ["os.system"],
        "OBJ": ["os.system"],
        "pathlib touch": ["builtins.getattr", "pathlib.PosixPath"],
    }.items():
        for form in _forms(weapons[name]).values():
            path.write_bytes(form)
            assert pickle_globals(path) == expected, name
    path.write_bytes(hostile.zipped(malformed.pickles()["extension 1"]))
    assert pickle_globals(path) == ["extension 1"]
    assert not (tmp_path / "canary").exists()


# Files that misuse the formats


def _refuse_all(files: dict[str, bytes], folder: Path) -> dict[str, str]:
    """Read each file; returns what is wrong with how some of them were refused."""
    wrongs: dict[str, str] = {}
    for index, (name, content) in enumerate(files.items()):
        path = folder / f"{index}.pt"
        path.write_bytes(content)
        wrong = _refusal(path)
        if wrong and (wrong != "was read" or name.partition(",")[0] not in READ_ANYWAY):
            wrongs[name] = wrong
        path.unlink()
    return wrongs


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_malformed_pickles_are_refused(tmp_path: Path, forked: None, every: int) -> None:
    pickles = malformed.pickles()
    assert len(pickles) >= 80
    chosen = list(pickles.items())[::every]
    files = {f"{name}, {f}": w for name, p in chosen for f, w in _forms(p).items()}
    # Torch spends all its time on each doubled tuple; one form is enough.
    files = {n: c for n, c in files.items() if "doubled" not in n or n.endswith("zip")}
    assert _refuse_all(files, tmp_path) == {}


def test_malformed_archives_are_refused(tmp_path: Path, forked: None) -> None:
    assert _refuse_all(malformed.archives(), tmp_path) == {}


def test_what_torch_saves_beside_plain_weights_is_refused_by_name(
    tmp_path: Path, forked: None
) -> None:
    for value, reason in (
        (torch.nn.Linear(2, 2), "it refers to torch.nn.modules.linear.Linear, which is not plain"),
        (argparse.Namespace(rank=8), "it refers to argparse.Namespace, which is not plain weights"),
        (numpy.float64(1), "it refers to numpy._core.multiarray.scalar, which is not plain"),
        (torch.zeros(2, 2).to_sparse(), "tensor value is sparse, quantised or has no data"),
        (torch.zeros(2, device="meta"), "tensor value is sparse, quantised or has no data"),
        (tmp_path, "it refers to pathlib.PosixPath, which is not plain weights"),
    ):
        for new_form in (True, False):
            path = tmp_path / "a.pt"
            torch.save({"value": value}, path, _use_new_zipfile_serialization=new_form)
            with pytest.raises(ValueError, match=f"cannot be read: {reason}"):
                read_checkpoint(path, allow_pickle=True)


def test_what_is_no_checkpoint_is_named(tmp_path: Path, forked: None) -> None:
    archives = malformed.archives()
    for name, reason in {
        "a text": "it is neither a zip archive nor an old PyTorch file",
        "a program": "it is neither a zip archive nor an old PyTorch file",
        "a zip cut off": "it is a broken or truncated zip archive",
        "an entry of 4 GiB without the field": "it needs too much memory",
        "a TorchScript program": "it is a TorchScript program, not a checkpoint",
        "one storage under many names": "its tensors would fill 20971520 bytes",
    }.items():
        (tmp_path / "a.pt").write_bytes(archives[name])
        with pytest.raises(ValueError, match=f"a.pt cannot be read: {reason}"):
            read_checkpoint(tmp_path / "a.pt", allow_pickle=True)


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name in ("pipe.pt", "pipe.safetensors", "loop.pt"):
        assert _refusal(tmp_path / name) is None, name
    (tmp_path / "zeros.pt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint(tmp_path / "zeros.pt", allow_pickle=True)
