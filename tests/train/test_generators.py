"""Which back-end generates training text, and runs with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.data import generators
from mlx_mtp.train.data.distil import distil
from mlx_mtp.train.data.generators import choose_generator
from mlx_mtp.train.data.records import Record, RecordWriter
from tests.helpers.fixtures_generate import EOS, byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, tiny_base
from tests.train.test_distil import LETTERS, readable


def letters() -> MTPModel:
    """A llama that writes letters, spaces and ends, of which PyTorch can make its own."""
    base = tiny_base("llama", vocab_size=BYTE_VOCAB, tie_word_embeddings=False)
    kept = mx.zeros((BYTE_VOCAB, 1))
    kept[mx.array([*LETTERS, EOS])] = 3.0
    base.lm_head.weight = base.lm_head.weight * kept
    return MTPModel(base, name="letters")


def test_pytorch_is_chosen_where_it_is_fast_and_knows_the_model(monkeypatch):
    name = choose_generator(letters(), "torch", max_tokens=100).name
    assert name in ("torch bfloat16", "torch float32")
    for fast, expected in ((True, name), (False, "mlx float32")):
        monkeypatch.setattr(generators, "_torch_is_faster", lambda fast=fast: fast)
        assert choose_generator(letters(), max_tokens=100).name == expected
    assert choose_generator(letters(), "mlx", max_tokens=100).batch_size == 16
    monkeypatch.setattr(generators, "_torch_is_faster", lambda: True)
    assert choose_generator(readable(), max_tokens=100).name == "mlx float32"
    full = SimpleNamespace(available=10_000)
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: full)
        assert choose_generator(letters(), max_tokens=100).name == "mlx float32"
    with pytest.raises(ValueError, match="PyTorch cannot run tiny"):
        choose_generator(readable(), "torch", max_tokens=100)


def write(path: Path) -> list[Record]:
    return distil(
        letters(),
        byte_tokenizer(),
        path,
        num_records=6,
        max_prompt_tokens=60,
        max_answer_tokens=25,
        batch_size=3,
        backend="torch",
    )


def test_an_interrupted_run_with_pytorch_ends_with_the_same_file(tmp_path, monkeypatch):
    records = write(tmp_path / "whole.jsonl")
    assert len(records) == 6 and any(record.meta["kind"] != "free" for record in records)
    saved = json.loads((tmp_path / "whole.settings.json").read_text())
    assert saved["generator"].startswith("torch ") and saved["method"] == "prompts"
    path, append = tmp_path / "part.jsonl", RecordWriter.append

    def stop(writer: RecordWriter, record: Record) -> None:
        if len(writer.records) == 4:
            raise KeyboardInterrupt
        append(writer, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordWriter, "append", stop)
        write(path)
    assert len(path.read_bytes().splitlines()) == 4
    write(path)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
