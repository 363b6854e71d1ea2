"""kill -9 at random moments of a conversion: no half-written output ever loads.

A zygote imports everything once and forks a child for each conversion, so that a thousand of them
take minutes; a child runs the same functions as the command.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.converters.export import export_adapter
from mlx_mtp.loading import load
from tests.helpers.tiny import save_tiny_pair

_ZYGOTE = """
import contextlib, importlib, os, sys
from pathlib import Path
from mlx_mtp.converters.convert import convert_model
model, checkpoint, output = sys.argv[1:4]

def fork(force, then=lambda: None):
    pid = os.fork()
    if pid == 0:
        convert_model(model, Path(output), checkpoint=Path(checkpoint), force=force)
        then()
        os._exit(0)
    return pid

# What a conversion imports on its way is imported here, once; a fork of a process in which MLX has
# computed would hang, so the first child tells what that is.
read, write = os.pipe()
fork(False, lambda: os.write(write, " ".join(sys.modules).encode()))
os.close(write)
names = b"".join(iter(lambda: os.read(read, 65536), b"")).decode().split()
os.wait()
for name in names:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    pid = fork(line == "force\\n")
    print(pid, flush=True)
    print("ended", os.waitpid(pid, 0)[1], flush=True)
"""


class Zygote:
    """Starts conversions of one model and checkpoint and kills them in time."""

    def __init__(self, model: Path, checkpoint: Path, output: Path) -> None:
        command = [sys.executable, "-c", _ZYGOTE, str(model), str(checkpoint), str(output)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def run(self, *, force: bool = False, kill_after_s: float | None = None) -> int:
        """Convert once; returns the wait status, which is 9 when it was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"force\n" if force else b"new\n")
        pid = int(self.process.stdout.readline())
        if kill_after_s is not None and not self._ends_within(kill_after_s):
            with contextlib.suppress(ProcessLookupError):  # it ended just now, and was waited for
                os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline().split()[1])

    def _ends_within(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


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
def zygote(sources: tuple[Path, Path], tmp_path: Path) -> Iterator[Zygote]:
    zygote = Zygote(*sources, tmp_path / "work" / "out")
    yield zygote
    zygote.close()


def timed(zygote: Zygote, **options: Any) -> tuple[int, float]:
    """Run a conversion; returns its wait status and its seconds."""
    started = time.perf_counter()
    return zygote.run(**options), time.perf_counter() - started


def kill_at_random(zygote: Zygote, work: Path, *, times: int, seed: int) -> int:
    """Kill that many conversions; returns how many of them really died by it."""
    output, rng, killed = work / "out", random.Random(seed), 0
    whole = contents(output)
    seconds: deque[float] = deque(maxlen=5)  # of runs that ended; the machine's speed changes
    for _ in range(3):
        shutil.rmtree(output)
        seconds.append(timed(zygote)[1])
    for turn in range(times):
        force = turn % 2 == 0
        if not force:
            shutil.rmtree(output, ignore_errors=True)
        delay = rng.uniform(0, 1.1 * statistics.median(seconds))
        status, took = timed(zygote, force=force, kill_after_s=delay)
        killed += status == signal.SIGKILL
        if status == 0:
            seconds.append(took)
        for folder in (output, *work.glob(".out.*/*")):
            if folder.is_dir() and contents(folder) != whole:
                assert not loads(folder), f"turn {turn}: {folder} is half written, yet loads"
        assert output.exists() or status or not force
    zygote.run(force=True)
    assert contents(output) == whole
    assert [path.name for path in work.iterdir()] == ["out"]
    return killed


@pytest.mark.parametrize(
    ("times", "min_killed"), [(20, 5), pytest.param(1000, 500, marks=pytest.mark.soak)]
)
def test_a_killed_conversion_leaves_nothing_that_loads(
    zygote: Zygote, tmp_path: Path, seed: int, times: int, min_killed: int
) -> None:
    assert kill_at_random(zygote, tmp_path / "work", times=times, seed=seed) > min_killed
