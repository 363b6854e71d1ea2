"""Kept beginnings: answers from them are those computed fresh, in memory and after a restart."""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.prefix_files import PrefixFiles
from mlx_mtp.apps.engine.prefix_setup import make_prefix_cache
from mlx_mtp.apps.engine.protocol import Load
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.model.caches.blocks import CacheBlocks
from mlx_mtp.model.identity import model_identity
from mlx_mtp.planning.auto import Speculation
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, tiny_base, tiny_mtp
from tests.server.prefix_kills import kill_writers
from tests.server.sessions import messages_of
from tests.server.test_engine import Turns

BLOCK = 16
KEY = "0123456789abcdef" * 4
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gemma3_text", {}),  # two layers of three have a window
    ("ministral3", {}),
    ("llama", {"max_kv_size": 30}),
    ("llama", {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 40}),
    ("qwen3", {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}),
]


def engine_of(
    kind: str = "llama",
    folder: Path | None = None,
    *,
    max_bytes: int = 2**24,
    file_bytes: int = 2**26,
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> Engine:
    """An engine with a new cache of beginnings; with a folder, its blocks are written there."""
    model = tiny_mtp(kind, vocab_size=BYTE_VOCAB, head_dim=32)
    tokenizer = byte_tokenizer()
    engine = Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=Speculation.guess(model.num_draft_tokens),
        prefixes=PrefixCache(CacheBlocks(model, chunk_size=8), max_bytes=0),
        texts=TokenTexts(tokenizer),
        prefill_step_size=8,
    )
    return restarted(engine, folder, max_bytes=max_bytes, file_bytes=file_bytes, log=log, **options)


def restarted(
    engine: Engine,
    folder: Path | None,
    *,
    key: str = KEY,
    max_bytes: int = 2**24,
    file_bytes: int = 2**26,
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> Engine:
    """The same engine with nothing in memory."""
    engine.prefixes.close()
    blocks = CacheBlocks(engine.model, chunk_size=8, **options)
    files = folder and PrefixFiles(
        folder, key=key, signatures=blocks.signatures(), max_bytes=file_bytes, block_size=BLOCK,
        log=log,
    )  # fmt: skip
    prefixes = PrefixCache(blocks, max_bytes=max_bytes, files=files or None, block_size=BLOCK)
    return replace(engine, prefixes=prefixes)


def answer(engine: Engine, ids: list[int], **more: Any) -> tuple[list[int], list[float], int, int]:
    """Ids and logprobs of an answer, cached ids, and those read from files."""
    job = {"prompt": ids, "max_tokens": 6, "pieces": True, "top_logprobs": 0} | more
    messages = messages_of(engine, {"layout": "quadratic"} | job)
    groups = [each for each in messages if each["type"] == "group"]
    logprobs = [entry["logprob"] for each in groups for entry in each["logprobs"]]
    start = messages[0]
    tokens = [token for each in groups for token in each["ids"]]
    return tokens, logprobs, start["cached_tokens"], start["read_tokens"]


def text(chance: random.Random, size: int) -> list[int]:
    return [chance.randrange(3, 200) for _ in range(size)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize(
    "num_requests", [10, pytest.param(150, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_answers_equal_fresh_ones_within_the_limits(kind, options, num_requests, tmp_path):
    chance = random.Random(repr((kind, options)))
    limits: dict[str, Any] = {"max_bytes": 300_000, "file_bytes": 400_000}
    engine = engine_of(kind, tmp_path, **limits, **options)
    texts: list[list[int]] = [[]]
    num_cached = num_read = 0
    for number in range(num_requests):
        if number % 3 == 2:
            engine = restarted(engine, tmp_path, **limits, **options)
        one = chance.choice(texts[-4:])
        ids = one[: chance.randint(len(one) * 3 // 4, len(one))] + text(
            chance, chance.randint(1, 60)
        )
        tokens, logprobs, cached, read = answer(engine, ids)
        expected, expected_logprobs, *nothing = answer(engine, ids, fresh=True)
        assert nothing == [0, 0] and tokens == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-5)
        assert engine.prefixes.nbytes <= limits["max_bytes"]
        num_cached, num_read = num_cached + cached, num_read + read
        texts.append(ids + tokens)
    engine.prefixes.close()
    assert size_of(tmp_path) <= limits["file_bytes"]
    assert num_cached > 100 and num_read > 0


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_rows_from_files_have_the_same_bits(kind, options, tmp_path):
    ids = text(random.Random(1), 70)
    engine = engine_of(kind, tmp_path, **options)
    answer(engine, ids)
    from_memory = engine.prefixes.take(ids[:65])
    engine = restarted(engine, tmp_path, **options)
    engine.prefixes.add(ids[:65], engine.prefixes.read(ids[:65]))
    from_files = engine.prefixes.take(ids[:65])
    assert from_memory.num_ids == from_files.num_ids == from_files.num_read == 64
    for one, other in zip(from_memory.cache.layers, from_files.cache.layers, strict=True):
        assert one.offset == other.offset == 64
        for a, b in zip(one.state, other.state, strict=True):
            pairs = zip(a, b, strict=True) if isinstance(a, tuple | list) else [(a, b)]
            assert all(mx.array_equal(x, y).item() for x, y in pairs)


def test_branches_share_their_beginning_and_the_size_is_that_of_the_arrays():
    chance, engine = random.Random(2), engine_of()
    shared = text(chance, 4 * BLOCK)
    answer(engine, shared + text(chance, 20))
    one = engine.prefixes.nbytes
    for count in range(1, 4):
        assert answer(engine, shared + text(chance, 20))[2] >= len(shared)
        assert engine.prefixes.nbytes <= one + count * (one - 4 * one // 6)
    layer = engine.prefixes.make_cache().attention_layers[0].inner
    row_bytes = 2 * 2 * 32 * 4 * len(engine.model.base.layers)
    assert layer.empty() and engine.prefixes.nbytes % row_bytes == 0


def test_what_another_answer_is_computing_is_waited_for_and_taken():
    engine = engine_of()
    ids = text(random.Random(3), 100)
    turns = Turns(engine)
    for number, tail in enumerate(([1, 2, 3], [4, 5, 6], [7, 8, 9])):
        turns.submit(number, {"prompt": ids + tail, "max_tokens": 4, "layout": "plain"})
    turns.wait_until_prepared(3)
    turns.scheduler.turn()
    turns.cancel(2)
    turns.run(3)
    assert turns.of(0)[0]["cached_tokens"] == 0
    assert turns.of(1)[0]["cached_tokens"] >= 96 and turns.of(1)[-1]["reason"] == "length"
    assert [message["type"] for message in turns.of(2)] == ["finished"]
    turns.submit(3, {"prompt": text(random.Random(4), 100), "max_tokens": 4})
    turns.submit(4, {"prompt": turns.scheduler and text(random.Random(4), 100), "max_tokens": 4})
    turns.wait_until_prepared(2)
    turns.scheduler.turn()
    turns.cancel(3)  # the other one does not wait for it any longer
    turns.run(5)
    assert turns.of(4)[-1]["reason"] == "length"


def test_a_block_that_is_used_in_part_keeps_its_own_file(tmp_path):
    chance = random.Random(10)
    one = text(chance, 4 * BLOCK + 1)
    other = one[: BLOCK + BLOCK // 2] + text(chance, 2 * BLOCK)
    engine = engine_of(folder=tmp_path)
    for ids in (one, other):
        answer(engine, ids)
    for ids in (other, one):
        engine = restarted(engine, tmp_path)
        tokens, logprobs, *cached = answer(engine, ids)
        expected = answer(engine, ids, fresh=True)
        assert tokens == expected[0] and cached == [len(ids) // BLOCK * BLOCK] * 2
        np.testing.assert_allclose(logprobs, expected[1], atol=2e-5)


def test_private_answers_leave_nothing(tmp_path):
    engine = engine_of(folder=tmp_path)
    answer(engine, text(random.Random(5), 60), fresh=True)
    engine.prefixes.close()
    assert len(engine.prefixes) == 0 and not list(tmp_path.iterdir())


def test_files_are_private(tmp_path):
    engine = engine_of(folder=tmp_path / "new")
    answer(engine, text(random.Random(6), 60))
    engine.prefixes.close()
    paths = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert len(paths) == 1 + 1 + 1 + 60 // BLOCK + 1  # folders, lock, blocks
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def _flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def _swap(path: Path) -> None:
    other = next(each for each in path.parent.iterdir() if each != path)
    path.write_bytes(other.read_bytes())


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def _foreign(path: Path) -> None:
    mx.save_safetensors(str(path), {"0.keys": mx.zeros((1, 2, BLOCK, 32))})


DAMAGE: dict[str, Callable[[Path], Any]] = {
    **{f"bit {part}": lambda path, part=part: _flip(path, part) for part in (0, 0.02, 0.5, 1)},
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "huge": lambda path: os.truncate(path, 2**32),
    "other text": _swap,
    "link": _link,
    "foreign": _foreign,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unusable_file_is_ignored_with_a_line(damage, tmp_path):
    lines: list[str] = []
    ids = text(random.Random(7), 5 * BLOCK + 3)
    engine = engine_of(folder=tmp_path, log=lines.append)
    expected = answer(engine, ids)[0]
    engine = restarted(engine, tmp_path, log=lines.append)
    assert engine.prefixes.files
    path = list(engine.prefixes.files.paths(ids))[2]
    assert path.is_file() and lines == []
    DAMAGE[damage](path)
    tokens, _, _, read = answer(engine, ids)
    assert tokens == expected and read == 2 * BLOCK
    (line,) = lines
    assert line.startswith(f"{path} is not used: ") and "\n" not in line
    engine = restarted(engine, tmp_path, log=lines.append)  # the block was written again
    if damage != "folder":
        assert answer(engine, ids)[::3] == (expected, 5 * BLOCK) and len(lines) == 1


def test_files_of_another_model_are_not_touched(tmp_path):
    ids = text(random.Random(8), 60)
    engine = engine_of(folder=tmp_path)
    answer(engine, ids)
    engine = restarted(engine, tmp_path, key=KEY[::-1])
    assert answer(engine, ids)[3] == 0
    engine = restarted(engine, tmp_path)
    assert answer(engine, ids)[3] == 48


def test_the_least_recently_used_files_are_removed(tmp_path):
    chance = random.Random(9)
    limits: dict[str, Any] = {"file_bytes": 12 * 20_000, "max_bytes": 2**24}
    engine = engine_of(folder=tmp_path, **limits)
    texts = [text(chance, 4 * BLOCK + 1) for _ in range(4)]
    for number, ids in enumerate(texts):
        answer(engine, ids)
        if number == 2:
            answer(engine, texts[0])
    engine.prefixes.close()
    assert engine.prefixes.files and engine.prefixes.files.num_removed > 0
    assert size_of(tmp_path) <= limits["file_bytes"]
    engine = restarted(engine, tmp_path, **limits)
    read = [sum(block.start == 0 for block in engine.prefixes.read(ids)) for ids in texts]
    assert read[0] == read[3] == 1
    assert len(engine.prefixes.read(texts[3])) == 4
    assert sum(len(engine.prefixes.read(ids)) for ids in texts) == len(
        list(tmp_path.rglob("*.safetensors"))
    ), "no block without those before it"


def test_several_processes_may_use_one_folder(tmp_path):
    engines = [engine_of(folder=tmp_path, file_bytes=300_000) for _ in range(3)]
    texts = [text(random.Random(number), 5 * BLOCK) for number in range(3)]
    expected = [answer(engines[0], ids, fresh=True)[0] for ids in texts]
    for _ in range(2):
        for engine in engines:
            for ids, tokens in zip(texts, expected, strict=True):
                assert answer(engine, ids)[0] == tokens
        closing = [threading.Thread(target=engine.prefixes.close) for engine in engines]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
    assert size_of(tmp_path) <= 300_000


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path):
    lines: list[str] = []
    (tmp_path / "file").write_text("")
    engine = engine_of(folder=tmp_path / "file", log=lines.append)
    for seed in range(2):
        answer(engine, text(random.Random(seed), 40))
    engine.prefixes.close()
    assert len(lines) == 1 and "cannot be written" in lines[0]


def test_the_key_depends_on_all_that_is_computed(tmp_path):
    load = Load(prefix_files_bytes=1, prefix_files_folder=str(tmp_path))
    model = tiny_mtp()
    files = make_prefix_cache(model, load).files
    assert files and files.folder.parent == tmp_path
    folders = {
        make_prefix_cache(each, settings, **options).files.folder  # pyright: ignore[reportOptionalMemberAccess]
        for each, settings, options in (
            (model, load, {}),
            (tiny_mtp(), load, {}),
            (tiny_mtp(adapter_seed=5), load, {}),
            (model, replace(load, prefill_step_size=64), {}),
            (model, load, {"max_kv_size": 64}),
        )
    }
    assert files.folder in folders and len(folders) == 4
    assert make_prefix_cache(model, Load()).files is None


def test_the_identity_sees_every_weight_and_setting():
    base = tiny_base()
    identity = model_identity(base)
    assert identity == model_identity(tiny_base())
    assert identity != model_identity(tiny_base(rope_theta=20000.0))
    base.layers[0].mlp.act = nn.relu
    assert len({identity, with_relu := model_identity(base)}) == 2
    base.layers[0].mlp.act = nn.gelu
    assert len({identity, with_relu, model_identity(base)}) == 3
    del base.layers[0].mlp.act
    assert identity == model_identity(base)
    weight = base.layers[1].mlp.up_proj.weight
    base.layers[1].mlp.up_proj.weight = weight.at[3, 5].add(1e-3)
    assert identity != model_identity(base)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_kills_while_writing_leave_no_file_that_loads_wrongly(kills, tmp_path):
    report = kill_writers(tmp_path, kills=kills, seed=kills)
    assert report.wrong == 0 and report.read > 0 and report.lines == []
