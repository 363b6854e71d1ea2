"""Shards, the progress bar, memory, and the benchmark of conversion."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.converters.base.shards import write_shards
from mlx_mtp.converters.progress import ByteProgress
from tests.converters.base_models import convert, edit, tensors
from tests.helpers.tiny import save_tiny_model


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.bool_])
def test_shards_hold_what_was_written(tmp_path, dtype):
    values = {
        "a": mx.arange(24).reshape(2, 3, 4).astype(dtype),
        "transposed": mx.arange(12).reshape(3, 4).astype(dtype).T,
        "scalar": mx.array(1).astype(dtype),
        "empty": mx.zeros((0, 3)).astype(dtype),
        "wide": mx.broadcast_to(mx.array([[1], [0]]).astype(dtype), (2, 5)),
    }
    sizes: list[int] = []
    total = write_shards(tmp_path, dict(values), max_bytes=100, written=sizes.append)
    assert total == sum(sizes) == sum(value.nbytes for value in values.values())
    found = tensors(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(values) == set(found)
    for name, value in values.items():
        assert found[name].dtype == dtype and mx.array_equal(found[name], value).item()


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_progress_shows_bytes_rate_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("mlx_mtp.converters.progress.time.monotonic", lambda: clock[0])
    stream: Any = Terminal()
    with ByteProgress(1_000_000_000, stream=stream) as progress:
        progress.advance(100_000_000)
        assert stream.text == ""
        clock[0] += 2.5
        progress.advance(150_000_000)
        line = stream.text.rpartition("\x1b[K")[2]
        assert line.startswith("Converting [#")
        assert line.endswith("] 250 MB/1.00 GB 100 MB/s ETA 0:08") and len(line) < 80
        progress.expect(1_000_000_000)
        clock[0] += 5000
        progress.say("Writing")
        assert "Writing [" in stream.text and "250 MB/2.00 GB 50 KB/s ETA 9:43:" in stream.text
    assert stream.text.endswith("\r\x1b[K")


def test_progress_of_a_conversion_counts_all_bytes(tmp_path, monkeypatch):
    stream: Any = Terminal()
    monkeypatch.setattr("mlx_mtp.converters.progress._REDRAW_S", 0)
    with ByteProgress(stream=stream, delay_s=0) as progress:
        _, result = convert(save_tiny_model(tmp_path / "in"), tmp_path, progress=progress)
        size = f"{result.num_bytes / 1000:.0f} KB"
        assert f"{size}/{size}" in stream.text.split("\x1b[K")[-1]
    assert stream.text.endswith("\r\x1b[K")


PROGRESS = """
import sys, time
from mlx_mtp.converters.progress import ByteProgress
with ByteProgress(10_000_000, delay_s=0.2) as progress:
    for _ in range(10):
        time.sleep(0.1)
        progress.advance(1_000_000)
print("done")
"""


def test_progress_at_a_terminal_and_in_a_pipe():
    """On a pseudo-terminal a bar that is wiped away; elsewhere nothing."""
    command = [sys.executable, "-c", PROGRESS]
    quiet = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (quiet.stdout, quiet.stderr) == ("done\n", "")
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while chunk := _read(ours):
            shown.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    environment = {**os.environ, "COLUMNS": "60"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, timeout=60, env=environment
    )
    os.close(theirs)
    thread.join(timeout=10)
    os.close(ours)
    text = b"".join(shown).decode()
    assert result.stdout == b"done\n" and text.endswith("\r\x1b[K")
    lines = text.split("\r\x1b[K")
    assert any("#" in line and "MB/s ETA 0:0" in line for line in lines)
    assert all(len(line) < 60 for line in lines)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


MEMORY = """
import resource, sys
from pathlib import Path
from mlx_mtp.converters.base.model import convert_base
convert_base(sys.argv[1], Path(sys.argv[2]), quantise=sys.argv[3] == "q")
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def peak_bytes(source: Path, output: Path, mode: str) -> int:
    """Peak memory of a conversion in a process of its own."""
    output.mkdir(parents=True)
    command = [sys.executable, "-c", MEMORY, str(source), str(output), mode]
    # Through a shell: a child's peak counts what its parent held, and this process holds torch.
    text = subprocess.check_output(["sh", "-c", '"$@"; exit $?', "sh", *command], timeout=300)
    return int(text)


def write_large(folder: Path) -> int:
    """Give a folder a model of 240 MB in four shards; returns the bytes of the last one."""
    options: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048}
    save_tiny_model(folder, num_hidden_layers=1, **options)
    edit(folder / "config.json", num_hidden_layers=16)
    found = tensors(folder)
    layer = {name: value for name, value in found.items() if ".layers.0." in name}
    (folder / "model.safetensors").unlink()
    for number in range(4):
        values = {} if number else {k: v for k, v in found.items() if k not in layer}
        for index in range(4 * number, 4 * number + 4):
            values |= {name.replace(".0.", f".{index}."): value for name, value in layer.items()}
        mx.save_safetensors(str(folder / f"model-{number + 1:05d}-of-00004.safetensors"), values)
    return (folder / "model-00004-of-00004.safetensors").stat().st_size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Beside a model of nothing, a large one needs a tensor or two more, never a shard."""
    small = save_tiny_model(tmp_path / "small", hidden_size=64)
    shard_bytes = write_large(tmp_path / "large")
    assert shard_bytes > 50e6
    floor = peak_bytes(small, tmp_path / "floor" / "out", "plain")
    for mode in ("plain", "q"):
        peak = peak_bytes(tmp_path / "large", tmp_path / mode / "out", mode)
        assert peak < floor + shard_bytes / 2, mode


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch):
    from mlx_mtp.lab import convert as bench

    for name, value in (("_HIDDEN", 128), ("_VOCAB", 512), ("_LAYERS", 2), ("_SHARD_BYTES", 2e5)):
        monkeypatch.setattr(bench, name, value)
    source = tmp_path / "model"
    source.mkdir()
    bench.make_model(source, 0.001)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    runs = bench.measure(tmp_path, source, repeats=1)
    result = bench.summary(runs, largest_shard_bytes=10**6)
    assert result["passed"] == (result["ratio"] <= 1.5) and result["results"]["mlx_lm"]["median_s"]
    with pytest.raises(ValueError, match="failed: last line"):
        bench.run(["sh", "-c", "echo first line; echo last line; exit 3"])


def test_the_benchmark_compares_pairs():
    from mlx_mtp.lab.convert import Run, summary

    runs = {
        "mlx_lm": [Run(1.0, 5), Run(4.0, 5), Run(2.0, 9)],
        "mlx_mtp": [Run(2.0, 7), Run(4.0, 8), Run(2.2, 7)],
    }
    result = summary(runs, largest_shard_bytes=100)
    assert result["ratio"] == 1.1 and result["passed"]
    assert result["results"]["mlx_mtp"] == {"median_s": 2.2, "peak_bytes": 8}
    runs["mlx_mtp"][0] = Run(2.0, 3 * 10**9)
    assert not summary(runs, largest_shard_bytes=100)["passed"]
