"""Remembered results: read back for the same key only, and never from a damaged file."""

from __future__ import annotations

import pytest

from mlx_mtp.storage.keyed_cache import KeyedCache


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))


def test_values_are_read_back_for_the_same_key() -> None:
    cache = KeyedCache("things", ["machine", "1.0"])
    assert cache.read(dict) is None
    cache.write({"a": [1, 2]})
    assert KeyedCache("things", ["machine", "1.0"]).read(dict) == {"a": [1, 2]}
    assert KeyedCache("things", ["machine", "1.1"]).read(dict) is None
    assert KeyedCache("others", ["machine", "1.0"]).read(dict) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"made_for": "x"}', "\udce9"])
def test_an_unreadable_file_is_a_miss(text: str) -> None:
    cache = KeyedCache("things", ["machine"])
    cache.write({"a": 1})
    cache.path.write_bytes(text.encode(errors="surrogateescape"))
    assert cache.read(dict) is None


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, AttributeError])
def test_values_that_cannot_be_decoded_are_a_miss(error: type[Exception]) -> None:
    def decode(values: object) -> None:
        raise error

    cache = KeyedCache("things", ["machine"])
    cache.write({"a": 1})
    assert cache.read(decode) is None


def test_a_file_copied_from_another_key_is_a_miss() -> None:
    mine, other = KeyedCache("things", ["mine"]), KeyedCache("things", ["other"])
    other.write({"a": 1})
    other.path.rename(mine.path)
    assert mine.read(dict) is None


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "file"))
    cache = KeyedCache("things", ["machine"])
    cache.write({"a": 1})
    assert cache.read(dict) is None
