"""Kill processes while they write blocks of prompts to files, and read what is left."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.apps.engine.prefix_files import PrefixFiles
from mlx_mtp.model.caches.blocks import Rows
from tests.helpers.processes import ForkServer

BLOCK, SHAPE = 16, (1, 2, 16, 512)
MAX_BYTES = 4_000_000
NUM_TEXTS = 20
_SOURCE = """
import sys
from pathlib import Path
from tests.server.prefix_kills import write_texts
def work(task):
    write_texts(Path(sys.argv[1]), int(task))
"""


@dataclass(frozen=True)
class Report:
    """What the kills left.

    Attributes:
        killed: processes that were killed before they had finished.
        read: blocks that could be read.
        wrong: blocks with other rows than were written.
        lines: lines about files that cannot be used.
    """

    killed: int
    read: int
    wrong: int
    lines: list[str]


def files_in(folder: Path, lines: list[str]) -> PrefixFiles:
    """The files under test."""
    signature = {"0.keys": (mx.float32, (1, 2, 512))}
    return PrefixFiles(
        folder, key="ab" * 32, signatures=[signature], max_bytes=MAX_BYTES, block_size=BLOCK,
        log=lines.append,
    )  # fmt: skip


def text_of(seed: int) -> list[int]:
    """The ids of a text."""
    return [random.Random(seed).randrange(1000)] * (8 * BLOCK)


def values_of(ids: list[int]) -> np.ndarray:
    """The right values of the block at the end of a text."""
    return np.random.default_rng([len(ids), ids[0]]).standard_normal(SHAPE).astype(np.float32)


def write_texts(folder: Path, seed: int) -> None:
    """Write the blocks of some texts, over and over in another order."""
    files = files_in(folder, [])
    for each in range(seed, seed + NUM_TEXTS):
        ids = text_of(each)
        for end, path in zip(range(BLOCK, len(ids) + 1, BLOCK), files.paths(ids), strict=True):
            rows: Rows = {"0.keys": mx.array(values_of(ids[:end]))}
            files.write(path, ids[:end], end - BLOCK, rows)


def kill_writers(folder: Path, *, kills: int, seed: int) -> Report:
    """Kill a process at a random time while it writes, so many times; read all after each."""
    chance, lines = random.Random(seed), list[str]()
    killed = read = wrong = 0
    with ForkServer(_SOURCE, [str(folder)]) as server:
        for number in range(kills):
            code = server.run(str(number), kill_after_s=chance.uniform(0.02, 0.4))
            killed += code == -9
            files = files_in(folder, lines)
            for each in range(number + NUM_TEXTS):
                ids = text_of(each)
                for block in files.read(ids, 0):
                    rows = np.array(block.to_rows()["0.keys"])
                    read += 1
                    wrong += not np.array_equal(rows, values_of(ids[: block.start + BLOCK]))
    return Report(killed, read, wrong, lines)
