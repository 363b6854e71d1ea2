"""kill -9 at random moments of a run with a time: after resuming, the same plans and the same bits.

Text, steps and evaluations take time on a clock that only work moves: a step now takes three times
as long as was measured, so the run has to plan again, and its text is cut short.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ForkServer, outcome_despite_kills

TOTAL_S = 80.0

_SOURCE = """
import json
from pathlib import Path
import mlx_mtp.backends.cpu.blas
import mlx.core as mx
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train import command, loop, timed
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.recipe import Rates
from mlx_mtp.train.run.folder import RunFolder
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, tiny_base
from tests.train.test_distil import readable

OPTIONS = {
    "time": "80s", "num_records": 16, "max_prompt_tokens": 40, "max_answer_tokens": 20,
    "distil_batch_size": 4, "held_out": 0.3, "batch_size": 1, "num_anchors": 4,
    "num_draft_tokens": 3, "rank": 4, "steps_per_report": 2, "steps_per_eval": 5, "save_every": 3,
    "val_batches": 2, "rows_per_forward": 9, "workers": 1, "seed": 5, "backend": "mlx",
}

class Clock:
    def __init__(self, folder):
        self.data, self.work = folder.data, 0.0
        saved = json.loads(folder.spent.read_text())["records"] if folder.spent.exists() else 0
        self.before = 2.0 * saved  # time begins where it was saved
    def __call__(self):
        if self.before is not None:
            before, self.before = self.before, None
            return before
        lines = self.data.read_bytes().count(b"\\n") if self.data.exists() else 0
        return 2.0 * lines + self.work

def work(task):
    mx.set_default_device(mx.cpu)
    folder = RunFolder(Path(task))
    clock = timed.CLOCK = Clock(folder)
    class Slow(StepGradient):
        def __call__(self, *args, step, **options):
            clock.work += 2.0 + 0.5 * (step % 3) + (2.0 if 6 <= step < 10 else 0.0)
            return super().__call__(*args, step=step, **options)
    def evaluate(*args, **options):
        clock.work += 1.0
        return loop_evaluate(*args, **options)
    def make_records(model, *args, **options):
        return command_make(readable(), *args, **options)
    loop_evaluate, command_make = loop.evaluate, command.make_records
    loop.make_gradient = lambda model, settings, **options: (Slow(model, settings), settings, None)
    loop.evaluate, command.make_records = evaluate, make_records
    command.load = lambda name, **options: (
        MTPModel(tiny_base(vocab_size=BYTE_VOCAB), name="tiny"), byte_tokenizer()
    )
    command.finish = lambda *args, **options: None
    timed.measure = lambda *args, **options: Rates(
        text_tps=64.0, rows_per_s=40.0, eval_text_s=0.25
    )
    timed.MIN_RECORDS = 6
    options = {"resume": True} if folder.is_begun() else OPTIONS
    if not command.run({"adapter_path": task, **options}):
        raise SystemExit(4)
"""


def outcome(output: Path) -> dict[str, Any]:
    """What a run leaves, without memory and paths."""
    names = ("adapters.safetensors", "training/data.jsonl", "training/recipe.json")
    files = {name: (output / name).read_bytes() for name in names}
    states = sorted(output.glob("training/state-*/state.*"))
    files |= {str(path.relative_to(output)): path.read_bytes() for path in states}
    records = [json.loads(line) for line in (output / "training/history.jsonl").open()]
    for record in records:
        record.pop("peak_memory_bytes", None)
    return {"files": files, "history": records}


@pytest.mark.slow
@pytest.mark.parametrize("min_kills", [6, pytest.param(50, marks=pytest.mark.soak)])
def test_a_killed_run_keeps_its_time_and_its_curve(
    tmp_path: Path, seed: int, min_kills: int
) -> None:
    with ForkServer(_SOURCE) as server:
        whole = outcome_despite_kills(
            server, tmp_path, outcome, seed=seed, min_kills=min_kills, longest=0.9
        )
    plans = [record for record in whole["history"] if record["kind"] == "plan"]
    assert len(plans) > 3 and len({plan["iters"] for plan in plans}) > 1  # it did plan again
    assert whole["files"]["training/data.jsonl"].count(b"\n") == 10  # of 16: time was over
    state = json.loads(list(whole["files"].items())[-2][1])
    spent_s = state["values"]["timing"]["spent_s"]
    assert 0.8 * TOTAL_S < spent_s <= TOTAL_S
