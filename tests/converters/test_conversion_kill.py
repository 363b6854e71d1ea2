"""kill -9 at random moments of a conversion: no half-written output ever loads.

A child runs the same functions as the command.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.converters.export import export_adapter
from mlx_mtp.loading import load
from tests.helpers.processes import ForkServer
from tests.helpers.tiny import save_tiny_pair

# The first child reports what a conversion imports, and the server imports it too.
_SOURCE = """
import contextlib, importlib, os, sys
from pathlib import Path
from mlx_mtp.converters.convert import convert_model
model, checkpoint, output = sys.argv[1:4]

def work(task):
    force = task == "force"
    convert_model(model, Path(output), checkpoint=Path(checkpoint), force=force)

read, write = os.pipe()
if os.fork() == 0:
    work("new")
    os.write(write, " ".join(sys.modules).encode())
    os._exit(0)
os.close(write)
names = b"".join(iter(lambda: os.read(read, 65536), b"")).decode().split()
os.wait()
for name in names:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def loads(folder: Path) -> bool:
    """Whether a folder loads as a model or its ``adapter/`` as one for it."""
    try:
        load(str(folder))
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a PEFT checkpoint for it."""
    root = tmp_path_factory.mktemp("sources")
    model, adapter = save_tiny_pair(root)
    export_adapter(str(adapter), root / "checkpoint", base_model=str(model))
    return model, root / "checkpoint"


@pytest.fixture
def server(sources: tuple[Path, Path], tmp_path: Path) -> Iterator[ForkServer]:
    """Converts the checkpoint; the tasks are ``new`` and ``force``."""
    with ForkServer(_SOURCE, [str(path) for path in (*sources, tmp_path / "work/out")]) as server:
        yield server


def timed(server: ForkServer, task: str, **options: Any) -> tuple[int, float]:
    """Run a conversion; returns its exit code and its seconds."""
    started = time.perf_counter()
    return server.run(task, **options), time.perf_counter() - started


def kill_at_random(server: ForkServer, work: Path, *, times: int, seed: int) -> int:
    """Kill that many conversions; returns how many of them really died by it."""
    output, rng, killed = work / "out", random.Random(seed), 0
    whole = contents(output)
    seconds: deque[float] = deque(maxlen=5)  # of runs that ended; the machine's speed changes
    for _ in range(3):
        shutil.rmtree(output)
        seconds.append(timed(server, "new")[1])
    for turn in range(times):
        force = turn % 2 == 0
        if not force:
            shutil.rmtree(output, ignore_errors=True)
        delay = rng.uniform(0, 1.1 * statistics.median(seconds))
        status, took = timed(server, "force" if force else "new", kill_after_s=delay)
        killed += status == -signal.SIGKILL
        if status == 0:
            seconds.append(took)
        for folder in (output, *work.glob(".out.*/*")):
            if folder.is_dir() and contents(folder) != whole:
                assert not loads(folder), f"turn {turn}: {folder} is half written, yet loads"
        assert output.exists() or status or not force
    server.run("force")
    assert contents(output) == whole
    assert [path.name for path in work.iterdir()] == ["out"]
    return killed


@pytest.mark.parametrize(
    ("times", "min_killed"), [(20, 5), pytest.param(1000, 500, marks=pytest.mark.soak)]
)
def test_a_killed_conversion_leaves_nothing_that_loads(
    server: ForkServer, tmp_path: Path, seed: int, times: int, min_killed: int
) -> None:
    assert kill_at_random(server, tmp_path / "work", times=times, seed=seed) > min_killed
