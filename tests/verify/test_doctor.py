"""``mlx-mtp doctor`` says what rows cost here, and whether our kernels are right."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_mtp.backends.metal.layers import matmul_operations
from mlx_mtp.cli.main import cli
from mlx_mtp.verify.doctor import examine, table
from tests.helpers.tiny import save_tiny_model, tiny_base


def test_layers_are_grouped_by_shape_and_format():
    base = tiny_base(quantised=True)
    groups = {operation.name: operation for operation in matmul_operations(base)}
    count = sum(len(operation.layers) for operation in groups.values())
    assert count == 7 * len(base.layers) + 1  # the embedding serves as the head
    assert all("4-bit g32 float32" in name for name in groups)


def test_the_report_has_a_time_for_every_number_of_rows():
    report = examine(tiny_base(), name="tiny", rows=(1, 2, 5))
    for shape in report["shapes"]:
        assert list(shape["stock_ms"]) == ["1", "2", "5"]
        assert min(shape["stock_ms"].values()) > 0
    total = sum(shape["layers"] * shape["stock_ms"]["5"] for shape in report["shapes"])
    assert report["step_ms"]["stock"]["5"] == pytest.approx(total)
    lines = table(report)
    assert any(line.startswith("all layers  stock") for line in lines)


def test_attention_is_timed_too():
    base = tiny_base(head_dim=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    report = examine(base, name="tiny", rows=(1, 2))
    (found,) = report["attention"]
    assert found["shape"] == "attention 2/1 heads of 64 float32, 1024 keys"
    assert found["check"] is None and not found["ours_ms"]  # without Metal
    assert list(found["stock_ms"]) == ["1", "2"] and min(found["stock_ms"].values()) > 0
    assert any(line.startswith(f"{found['shape']}  stock") for line in table(report))


@pytest.mark.slow
def test_the_command_writes_the_report(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    output = tmp_path / "report.json"
    command = ["doctor", "--model", str(model), "--rows", "4,1", "--output-file", str(output)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "M=1" in done.output and "M=4" in done.output and f"wrote {output}" in done.output
    report = json.loads(output.read_text())
    assert report["passed"] and report["machine"]["versions"]["mlx"]
    as_json = CliRunner().invoke(cli, [*command, "--json"])
    assert json.loads(as_json.stdout)["machine"] == report["machine"]


@pytest.mark.parametrize(
    ("rows", "culprit"), [("1,x", "'1,x'"), ("0", "0 is less than the minimum, 1")]
)
def test_bad_rows_are_refused(rows, culprit):
    done = CliRunner().invoke(cli, ["doctor", "--rows", rows])
    assert done.exit_code == 2 and culprit in done.stderr
