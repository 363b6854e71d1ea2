"""Curves show what the history holds, whatever it holds."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.train.run.curves import _speeds, draw_curves, terminal_curves


def history(steps: int = 200, *, masks: int = 4) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = 1 + 5 * math.exp(-step / 100)
        terms = {"base": loss, "lcm": loss / 10}
        records.append({"kind": "report", "step": step, "loss": loss, "terms": terms})
        if step % 50 == 0:
            records.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "tokens_per_step": 3 - 50 / step,
                    "acceptance": [0.8 - 0.1 * mask for mask in range(masks)],
                    "next_token_loss": 2.0,
                }
            )
    return records


def both(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history with an average from the second evaluation on."""
    for record in [record for record in records if record["kind"] == "evaluation"]:
        speed = record["tokens_per_step"]
        record["results"] = {"raw": {"tokens_per_step": speed - 0.1}}
        if record["step"] > 50:
            record["results"]["ema"] = {"tokens_per_step": speed}
    return records


def test_both_weights_have_a_line() -> None:
    lines = _speeds(both(history()))
    assert [step for step, _ in lines["raw weights"]] == [50, 100, 150, 200]
    assert [step for step, _ in lines["EMA weights"]] == [100, 150, 200]
    assert lines["EMA weights"][-1][1] == pytest.approx(2.75)
    assert list(_speeds(history())) == ["raw weights"]


@pytest.mark.parametrize(
    "records",
    [
        history(),
        both(history()),
        history(10),
        [],
        [{"kind": "report", "step": 1, "loss": math.nan, "terms": {"base": math.nan}}],
        history(50, masks=2) + history(100, masks=8)[-1:],
        [{"kind": "evaluation", "step": 0, "tokens_per_step": 1.0, "acceptance": []}],
    ],
    ids=[
        "whole",
        "averaged",
        "one report",
        "empty",
        "nan",
        "more masks later",
        "before the first step",
    ],
)
def test_every_history_is_drawn(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "training" / "curves.png"
    draw_curves(records, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [each.name for each in path.parent.iterdir()] == ["curves.png"]


def test_a_picture_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "curves.png"
    draw_curves(history(), path)
    before = path.read_bytes()

    def fails(self: Any, target: Path, **options: Any) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(figure.Figure, "savefig", fails)
    with pytest.raises(OSError, match="No space left"):
        draw_curves(history(), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["curves.png"]


def test_the_same_history_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        draw_curves(history(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotext", None)
    with pytest.raises(ValueError, match=r'plotext: pip install "mlx-mtp\[train\]"'):
        terminal_curves(history(), width=72, height=16)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "mlx-mtp\[train\]"'):
        draw_curves(history(), tmp_path / "curves.png")


@pytest.mark.parametrize(("width", "height"), [(72, 16), (80, 8), (60, 20)])
def test_charts_have_the_size_that_was_asked_for(width: int, height: int) -> None:
    lines = terminal_curves(history(), width=width, height=height).split("\n")
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "loss, by step" in lines[0] and "tokens per step, by step" in lines[0]
    assert not any("\x1b" in line for line in lines)


def test_a_falling_curve_falls() -> None:
    records = [record for record in history() if record["kind"] == "report"]
    lines = terminal_curves(records, width=60, height=12).split("\n")[2:-2]
    starts = [next((at for at, c in enumerate(line) if c > "\u2800"), None) for line in lines]
    drawn = [start for start in starts if start is not None]
    assert drawn[0] < 6 and drawn == sorted(drawn) and drawn[-1] > 30


def test_odd_histories_have_charts_too() -> None:
    def chart(records: list[dict[str, Any]]) -> str:
        return terminal_curves(records, width=72, height=10)

    assert chart([]) == ""
    assert chart([{"kind": "report", "step": 1, "loss": math.nan}]) == ""
    assert "loss" in chart([{"kind": "report", "step": 1, "loss": 2.0}])
    level = [{"kind": "report", "step": step, "loss": 2.0} for step in (1, 2, 2, 3)]
    assert "loss" in chart(level)
