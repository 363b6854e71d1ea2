"""Safetensors and index files: every claim in them is checked before MLX sees them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.storage.safetensors import (
    check_safetensors,
    read_index,
    read_json_object,
    read_safetensors,
    safe_member,
)


def _write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _save(path: Path, **tensors: mx.array) -> None:
    mx.save_safetensors(str(path), tensors)


def test_a_sound_file_is_described_and_read(tmp_path: Path) -> None:
    tensors = {
        "b": mx.arange(6, dtype=mx.int32).reshape(2, 3),
        "a": mx.array(1.5, dtype=mx.bfloat16),
        "empty": mx.zeros((0, 4)),
    }
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors, {"format": "pt"})
    infos = check_safetensors(tmp_path / "x.safetensors")
    assert {n: (i.dtype, i.shape, i.num_bytes) for n, i in infos.items()} == {
        "a": ("BF16", (), 2),
        "b": ("I32", (2, 3), 24),
        "empty": ("F32", (0, 4), 0),
    }
    assert sum(i.num_bytes for i in infos.values()) + min(i.start for i in infos.values()) == (
        os.path.getsize(tmp_path / "x.safetensors")
    )
    read = read_safetensors(tmp_path / "x.safetensors")
    assert all(mx.array_equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_outlive_the_name_of_their_file(tmp_path: Path) -> None:
    """PyTorch files are read through a temporary file; MLX reads it when tensors are used."""
    _save(tmp_path / "x.safetensors", a=mx.arange(100_000))
    read = read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    assert mx.array_equal(read["a"], mx.arange(100_000))


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": _entry(offsets=(0, 4))}, 4, "needs 8 bytes, its data_offsets give 4"),
        ({"a": _entry()}, 9, r"its tensors end at byte \d+, the file at"),
        ({"a": _entry()}, 7, r"its tensors end at byte \d+, the file at"),
        ({"a": _entry(), "b": _entry()}, 8, "tensor b begins at byte"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, 12, "tensor b begins at byte"),
        ({"a": _entry(), "b": _entry(offsets=(12, 20))}, 20, "tensor b begins at byte"),
        ({"a": _entry(offsets=(4, 12))}, 12, "tensor a begins at byte"),
        ({"a": _entry(offsets=(8, 0))}, 8, "its data_offsets give -8"),
        ({"a": _entry(offsets=(-8, 0))}, 8, "absurd data_offsets"),
        ({"a": _entry(offsets=(0, 8, 8))}, 8, "absurd data_offsets"),
        ({"a": _entry(offsets=(0.0, 8.0))}, 8, "absurd data_offsets"),
        ({"a": _entry(offsets=(False, 8))}, 8, "absurd data_offsets"),
        ({"a": _entry(shape=[-2, -1])}, 8, "absurd shape"),
        ({"a": _entry(shape=[2**32, 2**32])}, 8, "absurd shape"),
        ({"a": _entry(shape=[2**31 - 1] * 7 + [0], offsets=(0, 0))}, 0, "absurd shape"),
        ({"a": _entry(shape=[1] * 9)}, 8, "absurd shape"),
        ({"a": _entry(shape="2")}, 8, "absurd shape"),
        ({"a": _entry(shape=[True, 2])}, 8, "absurd shape"),
        ({"a": _entry(dtype="F31")}, 8, "unknown type 'F31'"),
        ({"a": _entry(dtype=["F32"])}, 8, "unknown type"),
        ({"a": {"dtype": "F32"}}, 8, "must have dtype, shape and data_offsets alone"),
        ({"a": [1]}, 8, "must have dtype, shape and data_offsets alone"),
        ({"a": _entry() | {"x": 1}}, 8, "must have dtype, shape and data_offsets alone"),
        ({"": _entry()}, 8, "'' is no name for a tensor"),
        ({"a\nb": _entry()}, 8, r"'a\\nb' is no name for a tensor"),
        ({"\ud800": _entry()}, 8, "is no name for a tensor"),
        ({"a": _entry(), "__metadata__": {"x": 1}}, 8, "__metadata__ must map names to text"),
        (b'{"a": 1, "a": 2}', 0, "key 'a' comes twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, "key 'dtype' comes twice"),
        (b'{"a": NaN}', 0, "NaN is not JSON"),
        (b'{"a": 1', 0, "its header is not JSON"),
        (b'{"a": "\xff"}', 0, "its header is not JSON"),
        (b"[]", 0, "does not begin with {"),
        (b'\xef\xbb\xbf{"a": 1}', 0, "does not begin with {"),
        (b'{"a":' * 100_000, 0, "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", 0, "its header is not JSON"),
    ],
)
def test_unsound_headers_are_refused(tmp_path: Path, header: Any, data: int, said: str) -> None:
    path = _write(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(
        ValueError, match=f"x.safetensors is not a sound safetensors file: .*{said}"
    ):
        check_safetensors(path)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (0, "does not begin with {"),
        (3, "its header is not JSON"),
        (1000, "its header claims 1000 bytes, the file has"),
        (2**40, "its header claims 1099511627776 bytes, at most"),
        (2**64 - 1, "its header claims 18446744073709551615 bytes, at most"),
    ],
)
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int, said: str) -> None:
    path = _write(tmp_path / "x.safetensors", {"a": _entry()}, bytes(8), length=length)
    with pytest.raises(ValueError, match=said):
        check_safetensors(path)


def test_a_short_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="x.safetensors cannot be read: No such file"):
        check_safetensors(path)
    path.write_bytes(b"1234567")
    with pytest.raises(ValueError, match="it has only 7 bytes"):
        check_safetensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="x.safetensors"):
        check_safetensors(path)


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_types_that_mlx_reads_wrongly_are_refused(tmp_path: Path, dtype: str) -> None:
    """MLX reads some 8-bit floats as bare bytes."""
    count = 8 if dtype == "F64" else 1
    path = _write(tmp_path / "x.safetensors", {"a": _entry(dtype, [1], [0, count])}, bytes(count))
    assert check_safetensors(path)["a"].dtype == dtype
    with pytest.raises(ValueError, match=f"tensor a has type {dtype}, which MLX cannot read"):
        read_safetensors(path)


def test_mlx_never_sees_a_file_that_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("MLX saw it")

    monkeypatch.setattr(mx, "load", load)
    path = _write(tmp_path / "x.safetensors", {"a": _entry()}, bytes(7))
    with pytest.raises(ValueError, match="not a sound"):
        read_safetensors(path)


# Index files


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "C:x",
        "x" * 300,
        "~/x/y",
    ],
)
def test_a_member_is_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain file name"):
        safe_member(tmp_path, name)


def test_a_member_is_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    (tmp_path / "folder").mkdir()
    assert safe_member(tmp_path, "x") == tmp_path / "x"
    for name in ("y", "folder"):
        with pytest.raises(ValueError, match=f"{name} is missing from"):
            safe_member(tmp_path, name)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "is not a plain file name"),
        ({"weight_map": {"a": "/x.safetensors"}}, "is not a plain file name"),
        ({"weight_map": {"a": "y.safetensors"}}, "y.safetensors is missing from"),
        ({"weight_map": {"a": 5}}, "the file of a must be a name, not 5"),
        ({"weight_map": {"a": None}}, "the file of a must be a name"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "must hold a JSON object, not list"),
    ],
)
def test_an_index_names_files_beside_it(tmp_path: Path, index: Any, said: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"index.json.*{said}"):
        read_index(path)


def test_settings_may_hold_infinities_but_not_a_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"limit": Infinity}')
    assert read_json_object(path) == {"limit": float("inf")}
    path.write_text('{"r": 8, "r": 16}')
    with pytest.raises(ValueError, match="config.json is not JSON: key 'r' comes twice"):
        read_json_object(path)
    path.write_bytes(b" " * (17 << 20))
    with pytest.raises(ValueError, match="longer than 16 MiB"):
        read_json_object(path)
