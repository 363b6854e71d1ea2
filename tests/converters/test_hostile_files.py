"""Hostile and broken checkpoints: each is refused in one line, soon, and nothing in it runs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy
import pytest
import torch

from mlx_mtp.converters.checkpoint import read_checkpoint
from mlx_mtp.converters.pytorch import checkpoint as torch_checkpoint
from mlx_mtp.converters.pytorch import sandbox
from mlx_mtp.converters.pytorch.archive import TorchFile, pickle_globals
from mlx_mtp.converters.pytorch.checkpoint import Request, limits_for
from tests.converters import hostile, malformed
from tests.converters.torch_zygote import Zygote

pytestmark = pytest.mark.skipif(
    sandbox.why_unavailable() is not None, reason="there is no sandbox here"
)

LIMIT_S = 5.0
GATES = ("closed", "open")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


def _open_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file through to the child, as if the check of its bytes did not exist."""

    def unchecked(path: Path) -> TorchFile:
        is_zip = path.read_bytes()[:4] == b"PK\x03\x04"
        return TorchFile(is_zip=is_zip, num_bytes=path.stat().st_size, globals=())

    monkeypatch.setattr(torch_checkpoint, "check_torch_file", unchecked)


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


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_no_hostile_pickle_runs(
    tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, gate: str, every: int
) -> None:
    monkeypatch.setattr(torch_checkpoint, "run_child", zygote)
    if gate == "open":
        _open_the_gate(monkeypatch)
    count = _refuse_weapons(tmp_path, every=every)
    assert count >= 140 // every


def test_no_hostile_pickle_runs_in_a_fresh_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _open_the_gate(monkeypatch)
    weapon = hostile.weapons(tmp_path / "canary", _new(tmp_path, "needs"))["posix.system"]
    (tmp_path / "checkpoint.pt").write_bytes(hostile.zipped(weapon))
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read: .*posix\.system"):
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
        if wrong := _refusal(path):
            wrongs[name] = wrong
        path.unlink()
    return wrongs


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_malformed_pickles_are_refused(
    tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, gate: str, every: int
) -> None:
    monkeypatch.setattr(torch_checkpoint, "run_child", zygote)
    if gate == "open":
        _open_the_gate(monkeypatch)
    pickles = malformed.pickles()
    assert len(pickles) >= 80
    chosen = list(pickles.items())[::every]
    files = {f"{name}, {f}": w for name, p in chosen for f, w in _forms(p).items()}
    if gate == "open":  # torch spends all its time on each doubled tuple; one form is enough
        files = {n: c for n, c in files.items() if "doubled" not in n or n.endswith("zip")}
    wrongs = _refuse_all(files, tmp_path)
    if gate == "open":  # torch is lenient with a few; what it makes of them is harmless
        wrongs = {name: wrong for name, wrong in wrongs.items() if wrong != "was read"}
    assert wrongs == {}


def test_malformed_archives_are_refused(
    tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_checkpoint, "run_child", zygote)
    assert _refuse_all(malformed.archives(), tmp_path) == {}


def test_what_torch_saves_beside_plain_weights_is_refused_by_name(tmp_path: Path) -> None:
    for value, named in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (argparse.Namespace(rank=8), "argparse.Namespace"),
        (numpy.float64(1), "scalar"),
        (torch.zeros(2, 2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (tmp_path, "pathlib.PosixPath"),
    ):
        for new_form in (True, False):
            path = tmp_path / "a.pt"
            torch.save({"value": value}, path, _use_new_zipfile_serialization=new_form)
            with pytest.raises(ValueError, match="is refused: it refers to") as refusal:
                read_checkpoint(path, allow_pickle=True)
            assert named in str(refusal.value)


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name in ("pipe.pt", "pipe.safetensors", "loop.pt"):
        assert _refusal(tmp_path / name) is None, name
    (tmp_path / "zeros.pt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint(tmp_path / "zeros.pt", allow_pickle=True)
