"""The commands about recurrent layers: memory and traffic from shapes, and the cost of a step."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mtp.lab import hybrid_step, recurrent_costs
from mlx_mtp.lab.recurrent_costs import MODELS, DeltaNet, costs
from mlx_mtp.model.layout import quadratic_layout
from tests.helpers.tiny import step_ids


def test_memory_and_traffic_of_a_known_model() -> None:
    found = costs(MODELS["Qwen3.5-4B"], num_draft_tokens=3)
    assert found.state == 24 * 2 * 2**20
    assert found.captured_row == pytest.approx(0.69e6, rel=0.01)
    assert found.captured == pytest.approx(53e6, rel=0.01)
    assert found.snapshots == pytest.approx(252e6, rel=0.01)
    assert found.stock_linear == 2 * found.plain
    assert found.stock_quadratic == 13 * found.plain
    assert found.ours == pytest.approx(found.plain, rel=0.06)


def test_the_commands_end_in_a_json_line() -> None:
    done = CliRunner().invoke(recurrent_costs.main, [])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]).keys() == MODELS.keys()
    arguments = ["--hidden", "128", "--layers", "2", "--interval", "2", "--rounds", "2"]
    done = CliRunner().invoke(hybrid_step.main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["quadratic, 1 draft"]["rows"] == 8 and found["plain"]["ratio"] > 0


def test_a_cache_captures_what_the_table_says() -> None:
    """Elements of 4 bytes here; the table's have 2."""
    model = hybrid_step.random_model(hidden=256, layers=2, interval=2, fast=False)
    layout = quadratic_layout(num_pending=1, num_draft_tokens=3, num_masks=2)
    cache = model.make_cache()
    model(mx.array([[3, 17]]), cache=cache)
    model(step_ids(layout, [1, 2, 3, 4]), cache=cache, layout=layout)
    cache.rewind(layout.num_masks)
    (layer,) = cache.recurrent_layers
    shape = DeltaNet(weights=1, layers=1, key_heads=2, heads=4, kv_bytes=1)
    arrays = {np.array(x).tobytes(): x.nbytes for x in layer.state}  # k also stands for q
    conv_inputs = (shape.taps - 1) * shape.conv_width * 4
    captured = sum(arrays.values()) - shape.state_bytes - conv_inputs
    of_rows = shape.captured_bytes / 2 - shape.conv_width  # what convolutions capture is elsewhere
    assert captured == 4 * of_rows * 4
