"""Shards, progress, memory, and the benchmark of conversion."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.storage.shards import write_shards
from tests.converters.base_models import edit, tensors, torch_files
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


PROGRESS = """
import functools, sys
from mlx_mtp import terminal
terminal.progress = functools.partial(terminal.progress, delay=0, mininterval=0)
terminal.Status = functools.partial(terminal.Status, delay_s=0)
from mlx_mtp.cli.main import cli
cli(sys.argv[1:])
"""


def test_progress_at_a_terminal_and_in_a_pipe(tmp_path):
    """Each stage shows at a pseudo-terminal, and is removed; nothing appears elsewhere."""
    source = save_tiny_model(tmp_path / "in")
    torch_files(source, parts=2)
    command = [sys.executable, "-c", PROGRESS, "convert", "--hf-path", str(source)]
    command += ["--allow-pickle", "--mlx-path"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    written: list[bytes] = []

    def read() -> None:
        while chunk := _read(ours):
            written.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    quiet = subprocess.run([*command, str(tmp_path / "quiet")], capture_output=True, check=True)
    assert quiet.stdout.startswith(b"wrote ") and quiet.stderr == b""
    command += [str(tmp_path / "out"), "--verify"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
    assert b"the same as PyTorch" in result.stdout
    os.close(theirs)
    thread.join(timeout=10)
    os.close(ours)
    text = b"".join(written).decode()
    for stage in (
        "Converting the tokenizer ...",
        "Reading pytorch_model-00002-of-00002.bin (2 of 2) in a sandbox ...",
        "Loading the model ...",
        "Writing: 100%|",
        "B/s]",
        "Running the original in PyTorch ...",
        "Running the converted model ...",
    ):
        assert stage in text, stage
    assert text.endswith("\r\x1b[K") and "\n" not in text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux reports the closed other end so
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
