"""GGUF files: read as PyPI's reader reads them, or refused in one line."""

from __future__ import annotations

import resource
import shutil
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFEndian

from mlx_mtp.model.base import open_base
from mlx_mtp.storage.gguf.convert import check_model, write_model
from mlx_mtp.storage.gguf.file import read_gguf
from mlx_mtp.storage.gguf.parts import gguf_files, is_gguf
from tests.helpers.gguf_models import add_key
from tests.helpers.tiny_gguf import mutated, write_tiny_gguf

KINDS = (Type.Q4_K, Type.Q8_0, Type.Q6_K, Type.F16, Type.BF16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", KINDS)


def refusal(path: Path) -> str:
    """Return why a file is refused, after checks that every refusal must pass."""
    with pytest.raises(ValueError) as caught:
        check_model(read_gguf(path))
    line = str(caught.value)
    assert str(path) in line and len(line.splitlines()) == 1 and line.isprintable()
    return line


def test_reads_what_the_reference_reads(tiny: Path) -> None:
    found, expected = read_gguf(tiny), GGUFReader(tiny)
    for name, entry in expected.fields.items():
        if not name.startswith("GGUF."):
            value = found.metadata[name]
            value = value.tolist() if isinstance(value, np.ndarray) else value
            assert value == entry.contents(), name
    assert list(found.tensors) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        info = found.tensors[tensor.name]
        assert (info.type, info.start) == (tensor.tensor_type, tensor.data_offset)
        assert list(info.shape) == tensor.shape.tolist()[::-1]
        assert info.rows().tobytes() == tensor.data.tobytes()


def test_every_kind_of_value(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **{"a.u8": np.uint8(200), "a.i32": np.int32(-7), "a.bool": True, "a.text": "ä\n"},
        **{"a.floats": [0.5, -1.0], "a.texts": ["", "x" * 1000], "a.flags": [True, False]},
    }
    path = write_tiny_gguf(tmp_path / "a.gguf", general=values)
    found = read_gguf(path).metadata
    for key, value in values.items():
        assert (found[key].tolist() if isinstance(found[key], np.ndarray) else found[key]) == value


class TestRefusals:
    def test_no_gguf(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gguf"
        for content, message in (
            (b"", "begins with b''"),
            (b"GGML" + bytes(40), "begins with b'GGML'"),
            (b"GGUF\3\0\0\0", "it has only 8 bytes"),
            (b"GGUF\1\0\0\0" + bytes(16), "it has version 1"),
            (b"GGUF\4\0\0\0" + bytes(16), "it has version 4"),
            (b"GGUF\0\0\0\3" + bytes(16), "it is big-endian"),
            (b"GGUF\3\0\0\0" + bytes(16), "has no general.architecture"),
        ):
            path.write_bytes(content)
            assert message in refusal(path)
        assert "No such file" in refusal(tmp_path / "none.gguf")
        (tmp_path / "folder.gguf").mkdir()
        assert "folder.gguf" in refusal(tmp_path / "folder.gguf")

    def test_a_big_endian_file(self, tmp_path: Path) -> None:
        writer = GGUFWriter(tmp_path / "a.gguf", "llama", endianess=GGUFEndian.BIG)
        writer.add_block_count(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert "it is big-endian, which is not read" in refusal(tmp_path / "a.gguf")

    @pytest.mark.parametrize(
        ("claim", "message"),
        [
            (struct.pack("<QQ", 2**60, 1), "claims 1152921504606846976 tensors"),
            (struct.pack("<QQ", 1, 2**60), "claims 1152921504606846976 keys"),
            (struct.pack("<QQ", 200_000, 0), "200000 tensors needs 6400000 bytes"),
            (struct.pack("<QQQ", 0, 1, 2**63), "a key claims 9223372036854775808 bytes"),
            (struct.pack("<QQQ", 0, 1, 500), "a key needs 500 bytes"),
            (_key := struct.pack("<QQQ1sI", 0, 1, 1, b"a", 99), "a has unknown type 99"),
            (struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 8, 2**50), "items of a, at most"),
            (struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 8, 10**6), "items of a needs 8000000"),
            (struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 4, 10**7), "items of a needs 40000000"),
            (struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 9, 1), "an array of arrays"),
            (struct.pack("<QQQ1sIB", 0, 1, 1, b"a", 7, 3), "a is neither true nor false: 3"),
            (struct.pack("<QQQ1sIQ", 0, 1, 1, b"a", 8, 2**40), "a claims 1099511627776 bytes"),
            (struct.pack("<QQQ1sIQ1s", 0, 1, 1, b"a", 8, 1, b"\xff"), "a is not UTF-8"),
            (struct.pack("<QQQ1sIB", 0, 1, 1, b"\n", 0, 3), "is no key"),
            (struct.pack("<QQ", 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"a", 0, 3), "comes twice"),
            (
                struct.pack("<QQQ17sII", 0, 1, 17, b"general.alignment", 4, 33),
                "general.alignment is 33",
            ),
            (struct.pack("<QQQ1sI", 1, 0, 1, b"t", 5), "t has 5 dimensions"),
            (struct.pack("<QQQ1sI", 1, 0, 1, b"t", 0), "t has 0 dimensions"),
            (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 2**63, 0, 0), "absurd shape"),
            (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 0, 0, 0), "absurd shape [0]"),
            (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 8, 77, 0), "t has unknown type 77"),
            (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 33, 2, 0), "needs multiples of 32"),
            (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 8, 0, 64), "begins at byte 64"),
            (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 2**30, 0, 0), "ends at byte"),
            (
                struct.pack("<QQQ1sIQQQQIQ", 1, 0, 1, b"t", 4, *[2**31 - 1] * 4, 0, 0),
                "ends at byte",
            ),
        ],
    )
    def test_claims(self, tmp_path: Path, claim: bytes, message: str) -> None:
        path = tmp_path / "a.gguf"
        path.write_bytes(b"GGUF\3\0\0\0" + claim + bytes(100))
        assert message in refusal(path)

    def test_tensors_twice(self, tmp_path: Path, tiny: Path) -> None:
        content = tiny.read_bytes().replace(b"blk.0.ffn_down.weight", b"blk.0.attn_out.weight")
        content = content.replace(b"blk.0.attn_out.weight", b"blk.0.ffn_gate.weight")
        (tmp_path / "a.gguf").write_bytes(content)
        assert "tensor blk.0.ffn_gate.weight comes twice" in refusal(tmp_path / "a.gguf")

    def test_other_kinds_of_files(self, tmp_path: Path) -> None:
        for arch, kind, message in (
            ("llama", "adapter", "is a LoRA adapter of llama.cpp, not a model"),
            ("clip", "model", "is a vision or audio projector (mmproj)"),
            ("clip", "mmproj", "is a vision or audio projector (mmproj)"),
            ("imatrix", "imatrix", "is an importance matrix"),
            ("controlvector", "model", "is a control vector"),
            ("llama", "vocab", "is a vocabulary without a model"),
            ("llama", "strange", "general.type is 'strange'"),
            ("mamba", "model", "architecture 'mamba' is not read; known are gemma2, gemma3"),
        ):
            path = tmp_path / f"{arch}-{kind}.gguf"
            write_tiny_gguf(path, arch=arch, general={"general.type": kind})
            assert message in refusal(path)

    def test_a_missing_tensor_or_token(self, tmp_path: Path) -> None:
        path = write_tiny_gguf(tmp_path / "a.gguf", left_out=("blk.0.attn_k.weight",))
        assert "tensor blk.0.attn_k.weight is missing" in refusal(path)
        path = write_tiny_gguf(tmp_path / "b.gguf", left_out=("token_embd.weight",))
        assert "has no token_embd.weight" in refusal(path)
        path = write_tiny_gguf(tmp_path / "c.gguf", keys={"feed_forward_length": 512})
        assert "has shape [256, 256], expected [512, 256]" in refusal(path)


class TestSplit:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        for number, path in enumerate(paths):
            writer = GGUFWriter(path, "llama")
            for key, value in (("no", number), ("count", 3)):
                writer.add_uint16(f"split.{key}", value)
            add_key(writer, "split.tensors.count", 3)
            writer.add_tensor(f"t{number}", np.full((2, 8), number, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return paths

    def test_parts_are_joined(self, parts: list[Path]) -> None:
        for path in parts:
            found = read_gguf(path)
            assert found.paths == tuple(parts)
            for number in range(3):
                values = found.tensors[f"t{number}"].rows().view(np.float32)
                assert (values == number).all()
        assert gguf_files(parts[0].parent) == [parts[0]]

    def test_a_part_is_missing(self, parts: list[Path]) -> None:
        parts[1].unlink()
        with pytest.raises(ValueError, match="m-00002-of-00003.gguf is missing"):
            read_gguf(parts[0])

    def test_parts_in_the_wrong_order(self, parts: list[Path]) -> None:
        parts[1].rename(parts[0].with_name("x"))
        parts[2].rename(parts[1])
        parts[0].with_name("x").rename(parts[2])
        with pytest.raises(ValueError, match="says that it is part 2 of 3, by its name it is 1"):
            read_gguf(parts[0])

    def test_a_part_under_another_name(self, parts: list[Path]) -> None:
        path = parts[0].rename(parts[0].with_name("model.gguf"))
        with pytest.raises(ValueError, match="its name must end in -00001-of-00003.gguf"):
            read_gguf(path)


def _outcome(path: Path, folder: Path) -> str:
    """Convert a file and open the result; return whether it was read or refused."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        write_model(read_gguf(path), folder)
        open_base(folder)
    except ValueError as error:
        line = str(error)
        assert len(line.splitlines()) == 1 and line.isprintable() and len(line) < 1000
        assert str(path) in line or str(folder) in line or "config.json" in line
        return "refused"
    return "read"


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.soak)]
)
def test_mutations_are_read_or_refused(tmp_path: Path, tiny: Path, seeds: range) -> None:
    content = tiny.read_bytes()
    header = min(info.start for info in read_gguf(tiny).tensors.values())
    path, folder = tmp_path / "mutated.gguf", tmp_path / "out"
    assert _outcome(tiny, folder) == "read"
    outcomes: Counter[str] = Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        kind, data = mutated(content, header, seed)
        path.write_bytes(data)
        start = time.perf_counter()
        outcomes[_outcome(path, folder)] += 1
        assert time.perf_counter() - start < 5, (kind, seed)
    assert outcomes["refused"] > len(seeds) // 2
    # In KB on Linux, in bytes on macOS; in either case nothing near what the headers claim.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * memory + 200_000


def test_is_gguf(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGML")
    assert is_gguf(tiny) and not is_gguf(tmp_path / "a.gguf") and not is_gguf(tmp_path)
