"""kill -9 at random moments of a training: after a resume the result is the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.train.settings import ROW_WEIGHTS
from tests.helpers.processes import ForkServer, outcome_despite_kills

_TIMING = ("seconds", "tokens_per_s", "rows_per_s", "peak_memory_bytes")

_SOURCE = """
import sys
from pathlib import Path
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

def work(task):
    output = Path(task)
    mx.set_default_device(mx.cpu)
    settings = TrainSettings(
        num_draft_tokens=3, rank=4, iters=14, batch_size=2, num_anchors=4, warmup=3,
        learning_rate=3e-3, rows_per_forward=9, steps_per_report=2, steps_per_eval=5,
        save_every=3, val_batches=2, drop_late=0.1, seed=5, workers=1,
        ema=0.6, lora_b_rate=4.0, row_weights=sys.argv[1],
    )
    model = new_adapter(MTPModel(tiny_base()), settings)
    data = TrainData(train=texts(7, 1), held_out=texts(2, 2), data_hash="x")
    resume = newest_state(output / "training") is not None
    train(model, data, settings, output, resume=resume)
"""


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
@pytest.mark.parametrize("rows", ROW_WEIGHTS)
@pytest.mark.parametrize("min_kills", [8, pytest.param(50, marks=pytest.mark.soak)])
def test_a_killed_training_resumes_bit_for_bit(
    tmp_path: Path, seed: int, min_kills: int, rows: str
) -> None:
    with ForkServer(_SOURCE, [rows]) as server:
        whole = outcome_despite_kills(
            server, tmp_path, outcome, seed=seed, min_kills=min_kills, longest=0.6
        )
    assert len(whole["history"]) == 11  # 7 reports; evaluations at steps 0, 5, 10 and 14
    last = whole["history"][-1]
    assert set(last["results"]) == {"raw", "ema"} and last["weights"] in last["results"]
