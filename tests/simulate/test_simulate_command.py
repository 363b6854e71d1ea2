"""``mlx-mtp simulate``: traces, chips, tables, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_mtp.cli.main import cli
from mlx_mtp.loading import load
from mlx_mtp.simulate.chips import chip_named, chips
from mlx_mtp.simulate.report import HEAD, list_lines
from mlx_mtp.simulate.trace import Trace, read_trace, write_trace
from tests.helpers.simulated import ACCEPT_PROBS, CURVE, synthetic
from tests.helpers.tiny import random_heads, save_adapter, save_tiny_pair


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, ["simulate", *map(str, args)])


def failure(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {"trace": tmp_path / "trace.json", "curve": tmp_path / "mine.json"}
    write_trace(synthetic(ACCEPT_PROBS[:4], answers=4, tokens=24), made["trace"])
    made["curve"].write_text(json.dumps({"model": "m"} | CURVE.to_dict()))
    return made


class TestTrace:
    def test_a_trace_is_read_as_written(self, tmp_path: Path) -> None:
        trace = synthetic(answers=3)
        write_trace(trace, tmp_path / "t.json")
        assert read_trace(tmp_path / "t.json") == trace

    def test_the_included_one_has_every_kind_of_text(self) -> None:
        trace = read_trace()
        assert set(trace.kinds) == {"chat", "code", "maths", "lists", "edit", "languages"}
        assert trace.num_draft_tokens == 8 and 0.3 < trace.prefix_probs()[1] < 0.9

    def test_positions_without_room_do_not_count(self) -> None:
        trace = synthetic((1.0, 1.0), answers=2, tokens=5)
        assert trace.prefix_probs() == pytest.approx([1, 1, 1])
        assert trace.limited(1).answers[0].counts == (1, 1, 1, 1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "not an acceptance trace"),
            ({"answers": []}, "the trace has no answers"),
            ({"answers": [{"id": "a"}]}, "not an acceptance trace: KeyError"),
            ({"shares": [0.2, 0.5]}, "shares must be between 0 and 1"),
            ({"num_draft_tokens": 0}, "num_draft_tokens must be 1 to"),
            ({"num_draft_tokens": 1}, "a0 has count"),
            ({"max_tokens": 5}, "a0 has 50 prompt ids and 24 tokens"),
        ],
    )
    def test_bad_ones_are_one_line_with_the_cause(self, files, change, message: str) -> None:
        values = json.loads(files["trace"].read_text()) | change
        files["trace"].write_text(json.dumps(values))
        line = failure("--trace", files["trace"], "--chip", "m2")
        assert str(files["trace"]) in line and message in line

    def test_a_character_that_is_no_count(self, files) -> None:
        values = json.loads(files["trace"].read_text())
        values["answers"][1]["counts"] = "?" + values["answers"][1]["counts"][1:]
        files["trace"].write_text(json.dumps(values))
        assert "a1 has the count '?'" in failure("--trace", files["trace"])
        files["trace"].write_text("{")
        assert str(files["trace"]) in failure("--trace", files["trace"])


class TestChips:
    @pytest.mark.parametrize("name", list(chips()))
    def test_a_curve_has_the_published_costs(self, name: str) -> None:
        chip, curve = chips()[name], chips()[name].machine(8).curve
        forward = np.array(curve.forward_ms[0])
        assert len(curve.draft_ms) == 9 and curve.rows[-1] == max(chip.ratios)
        for rows, ratio in chip.ratios.items():
            ratio_of_curve = forward[rows - 1] / forward[0]
            if chip.measured == "step":
                assert ratio_of_curve == pytest.approx(ratio)
            else:  # nine tenths of the step, and the rest
                assert 0.85 * ratio <= ratio_of_curve <= ratio + 0.4

    def test_times_come_from_the_bandwidth(self) -> None:
        plain = chip_named("m4-pro").machine(8).curve.forward_ms[0][0]
        assert plain == pytest.approx(15.2 / (0.85 * 0.273) / 0.9 + 0.25)
        assert not chip_named("m3-ultra-bf16").machine(8).in_ms

    def test_a_known_rate_scales_all_times(self) -> None:
        machine = chip_named("m3-ultra-bf16").machine(4).scaled_to(20)
        assert machine.in_ms and machine.curve.forward_ms[0][0] == pytest.approx(50)
        with pytest.raises(ValueError, match="positive, got 0"):
            machine.scaled_to(0)

    def test_the_list_names_every_source(self) -> None:
        text = "\n".join(list_lines())
        assert all(
            f"{chip.name}: {chip.description}\n  source: {chip.source}" in text
            for chip in chips().values()
        )


class TestCommand:
    def test_the_first_line_says_that_it_is_a_simulation(self, files) -> None:
        done = invoke(
            "--trace", files["trace"], "--chip", "m2", "--chip", "m3-ultra-bf16", "--by-kind"
        )
        assert done.exit_code == 0, done.output
        lines = done.stdout.splitlines()
        assert lines[0] == HEAD == "A simulation: nothing here was measured on these chips."
        assert sum(line.startswith("  one ") for line in lines) == 4
        assert "~" in done.stdout and "1.00 x" in done.stdout

    def test_takes_a_curve_and_prints_json(self, files) -> None:
        done = invoke(
            "--trace", files["trace"], "--costs", files["curve"], "--json", "--num-draft-tokens", 3
        )
        (machine,) = json.loads(done.stdout)["machines"]
        assert machine["machine"] == "mine" and machine["in_ms"]
        assert machine["all"]["plain"]["speedup"] == 1.0 < machine["all"]["auto"]["speedup"]
        assert machine["all"]["auto"]["speedup"] <= machine["clairvoyant_speedup"]
        scaled = invoke(
            "--trace", files["trace"], "--costs", files["curve"], "--plain-tps", 30, "--json"
        )
        assert json.loads(scaled.stdout)["machines"][0]["all"]["plain"]["tps"] == pytest.approx(
            30, rel=0.1
        )

    def test_draws(self, files, tmp_path: Path) -> None:
        picture = tmp_path / "p.png"
        done = invoke("--trace", files["trace"], "--chip", "m2", "--plot", picture)
        assert done.exit_code == 0 and picture.read_bytes()[:4] == b"\x89PNG"
        assert ".png" in failure("--trace", files["trace"], "--chip", "m2", "--plot", "p.svg")

    def test_bad_input(self, files) -> None:
        assert "unknown chip 'm9'; known chips: m2" in failure("--chip", "m9")
        assert "has the kinds one, two, not 'poems'" in failure(
            "--trace", files["trace"], "--kinds", "poems"
        )
        assert "trace's 4, got 5" in failure("--trace", files["trace"], "--num-draft-tokens", 5)
        for text in ("", "[]", '{"rows": [1]}'):
            files["curve"].write_text(text)
            assert str(files["curve"]) in failure("--costs", files["curve"])

    def test_here_takes_no_curve_from_elsewhere(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
        model, adapter = save_tiny_pair(tmp_path)
        where = ("--model", model, "--adapter-path", adapter)
        (tmp_path / "cache" / "costs").mkdir(parents=True)
        (tmp_path / "cache" / "costs" / "of-another.json").write_text(json.dumps(CURVE.to_dict()))
        assert "no step costs are stored for" in failure("--here", *where)

    def test_heads_are_not_replayed_as_masks(self, tmp_path: Path) -> None:
        model, _ = save_tiny_pair(tmp_path)
        base, _ = load(str(model), mtp=False)
        heads = save_adapter(tmp_path / "heads", *random_heads(base.base))
        where = ("--model", model, "--adapter-path", heads, "--record", tmp_path / "t.json")
        assert f"{heads} has heads, and simulate replays mask tokens" in failure(*where)

    def test_records_what_it_replays(self, tmp_path: Path) -> None:
        model, adapter = save_tiny_pair(tmp_path)
        prompts = tmp_path / "p.jsonl"
        prompts.write_text('{"prompt": "ab", "kind": "x"}\n{"prompt": "cd"}\n{"prompt": "ef"}\n')
        done = invoke(
            "--record", tmp_path / "t.json", "--prompts", prompts, "--num-prompts", 2, "-m", 6,
            "--model", model, "--adapter-path", adapter, "--texts", tmp_path / "texts.jsonl",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        trace: Trace = read_trace(tmp_path / "t.json")
        assert trace.kinds == ("x", "user") and len(trace.answers) == 2
        assert trace.num_draft_tokens == 4 and trace.max_tokens == 6
        again = invoke("--trace", tmp_path / "t.json", "--chip", "m4-pro")
        assert again.exit_code == 0, again.output
