"""The processor time of the planner covers every step of a replay."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from mlx_mtp.lab.planner_time import main, planner_us
from mlx_mtp.simulate.chips import Machine
from mlx_mtp.simulate.replay import StepCosts
from mlx_mtp.simulate.simulation import replay_auto
from mlx_mtp.simulate.trace import write_trace
from tests.helpers.simulated import CURVE, synthetic


def test_every_step_is_timed() -> None:
    machine, trace = Machine("curve", "", CURVE), synthetic(answers=2)
    times = planner_us(trace, machine)
    steps = replay_auto(trace, machine, StepCosts(CURVE, max_rows=81)).total.steps
    assert len(times) == steps and times.min() >= 0 < times.sum()


def test_the_command_ends_in_a_json_line(tmp_path: Path) -> None:
    write_trace(synthetic(answers=2, tokens=3000), tmp_path / "trace.json")
    done = CliRunner().invoke(main, ["--trace", str(tmp_path / "trace.json"), "--chip", "m2"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["m2"]["steps"] > 0
