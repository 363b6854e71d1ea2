"""kill -9 at random moments of a training: resumed, it gives the bits of one that was let be.

A zygote imports everything once and forks a child for each run; it never computes, because a fork
of a process in which MLX has computed would hang.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KILLS = 50
_TIMING = ("seconds", "tokens_per_s", "rows_per_s", "peak_memory_bytes")

_ZYGOTE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mlx_mtp.backends.cpu.blas
import mlx.core as mx
import numpy as np
from tests.helpers.tiny import tiny_base
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter
from mlx_mtp.train.run.checkpoint import newest_state
from mlx_mtp.train.loop import TrainData, train
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.train.settings import TrainSettings

def texts(count, seed):
    rng = np.random.default_rng(seed)
    ids = [tuple(int(i) for i in rng.integers(2, 12, 24)) for _ in range(count)]
    return [TokenSequence(ids=each, answer=(False,) * 6 + (True,) * 18) for each in ids]

def run(output):
    mx.set_default_device(mx.cpu)
    settings = TrainSettings(
        num_draft_tokens=3, rank=4, iters=14, batch_size=2, num_anchors=4, warmup=3,
        learning_rate=3e-3, rows_per_forward=9, steps_per_report=2, steps_per_eval=5,
        save_every=3, val_batches=2, drop_late=0.1, seed=5, workers=1,
    )
    model = new_adapter(MTPModel(tiny_base()), settings)
    data = TrainData(train=texts(7, 1), held_out=texts(2, 2), data_hash="x")
    resume = newest_state(output / "training") is not None
    train(model, data, settings, output, resume=resume)

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run(Path(line.rstrip("\\n")))
        os._exit(0)
    print(pid, flush=True)
    print("ended", os.waitpid(pid, 0)[1], flush=True)
"""


class Zygote:
    """Starts trainings and kills them in time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ZYGOTE, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        assert self.stdout.readline() == b"ready\n"

    def run(self, output: Path, *, kill_after_s: float | None = None) -> bool:
        """Train, on from where the folder stands; tells whether it ended by itself."""
        self.stdin.write(f"{output}\n".encode())
        pid = int(self.stdout.readline())
        if kill_after_s is not None and not select.select([self.stdout], [], [], kill_after_s)[0]:
            os.kill(pid, signal.SIGKILL)
        status = int(self.stdout.readline().split()[1])
        assert status in (0, signal.SIGKILL)
        return status == 0

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def outcome(output: Path) -> dict[str, Any]:
    """Everything that a run leaves, bit by bit, without the times."""
    files = {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }
    lines = files.pop("training/history.jsonl").splitlines()
    records = [json.loads(line) for line in lines]
    states = [name for name in files if name.endswith("state.json")]
    values = {name: json.loads(files.pop(name)) for name in states}
    for state in values.values():
        state.pop("sha256")
        state["values"]["sums"].pop("seconds")
    for record in records:
        for name in _TIMING:
            record.pop(name, None)
    return {"files": files, "history": records, "states": values}


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    zygote, rng = Zygote(), random.Random(0)
    try:
        zygote.run(tmp_path / "first")  # warms up
        started = time.perf_counter()
        zygote.run(tmp_path / "whole")
        seconds = time.perf_counter() - started
        wanted = outcome(tmp_path / "whole")
        assert outcome(tmp_path / "first") == wanted
        kills = runs = 0
        while kills < KILLS:
            output = tmp_path / f"run-{runs}"
            while not zygote.run(output, kill_after_s=rng.uniform(0, 0.6 * seconds)):
                kills += 1
            assert outcome(output) == wanted, f"run {runs} after {kills} kills"
            runs += 1
    finally:
        zygote.close()
    assert len(wanted["history"]) == 11  # 7 reports; evaluations at steps 0, 5, 10 and 14
