"""Conversion compared with mlx-lm's, in pairs: ``python -m mlx_mtp.lab.convert``.

A random float16 llama is quantised by ``mlx_lm.convert -q`` and by ``mlx-mtp convert -q``, each in
its own process, in alternating order.  Times are of whole processes; the result is the median of
the ratios of pairs.  Memory is the process's peak resident set, and the page cache is warm for
both: each file is read once before the clock starts.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.cli.options import option
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.storage.shards import write_shards

MAX_RATIO = 1.5
MEMORY_MARGIN_BYTES = 2 * 10**9  # over the largest shard

_HIDDEN = 2048
_LAYERS = 16
_VOCAB = 32000
_HEADS = 16
_KV_HEADS = 8
_SHARD_BYTES = 4 * 10**8


@dataclass(frozen=True)
class Run:
    """One conversion.

    Attributes:
        seconds: duration of the whole process.
        peak_bytes: its peak resident set.
    """

    seconds: float
    peak_bytes: int


def make_model(folder: str | Path, size_gb: float, *, seed: int = 0) -> None:
    """Write a random float16 llama with a byte-level tokenizer, in shards.

    Args:
        folder: an existing, empty folder.
        size_gb: approximate size in gigabytes.
        seed: random seed of the weights.
    """
    from mlx_lm.models.llama import Model, ModelArgs

    folder = Path(folder)
    attention = _HIDDEN * (_HIDDEN + _HIDDEN // _HEADS * _KV_HEADS) * 2
    per_layer = size_gb * 5e8 - 2 * _VOCAB * _HIDDEN
    width = max(64, round((per_layer / _LAYERS - attention) / (3 * _HIDDEN) / 64) * 64)
    config = _config(width)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(folder)
    mx.random.seed(seed)
    model: Any = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    tensors: Any = dict(tree_flatten(model.parameters()))
    del model  # so that ``write_shards`` frees the memory of written tensors
    write_shards(folder, tensors, max_bytes=_SHARD_BYTES)


def _config(width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": width,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": _VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer whose vocabulary is padded with words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    vocab |= {f"word{index}": index for index in range(len(vocab), _VOCAB - 1)}
    tokenizer: Any = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)


def run(command: Sequence[str]) -> Run:
    """Run a conversion in its own process.

    Raises:
        ValueError: it fails; the message has the last line that it printed.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"{' '.join(command[:4])} failed: {''.join(last)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit)


def _commands(source: Path, output: Path) -> dict[str, list[str]]:
    tail = ["--hf-path", str(source), "--mlx-path", str(output), "-q"]
    return {
        "mlx_lm": [sys.executable, "-m", "mlx_lm", "convert", *tail],
        "mlx_mtp": [sys.executable, "-m", "mlx_mtp", "convert", *tail],
    }


def measure(folder: Path, source: Path, *, repeats: int) -> dict[str, list[Run]]:
    """Convert with both in alternating order; the output is removed each time."""
    runs: dict[str, list[Run]] = {"mlx_lm": [], "mlx_mtp": []}
    for turn in range(repeats):
        for name in sorted(runs, reverse=turn % 2 == 1):
            for path in source.glob("*.safetensors"):
                _read_through(path)
            output = folder / "out"
            result = run(_commands(source, output)[name])
            runs[name].append(result)
            shutil.rmtree(output)
            print(f"{name}: {result.seconds:.2f} s, peak {result.peak_bytes / 1e9:.2f} GB")
    return runs


def _read_through(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def summary(runs: dict[str, list[Run]], *, largest_shard_bytes: int) -> dict[str, Any]:
    """Medians, the median ratio of pairs, peaks, and whether they are within the bounds."""
    pairs = zip(runs["mlx_mtp"], runs["mlx_lm"], strict=True)
    ratio = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
    results: dict[str, Any] = {
        name: {
            "median_s": round(statistics.median(run.seconds for run in group), 3),
            "peak_bytes": max(run.peak_bytes for run in group),
        }
        for name, group in runs.items()
    }
    bound = largest_shard_bytes + MEMORY_MARGIN_BYTES
    return {
        "results": results,
        "ratio": round(ratio, 3),
        "max_ratio": MAX_RATIO,
        "largest_shard_bytes": largest_shard_bytes,
        "max_peak_bytes": bound,
        "passed": ratio <= MAX_RATIO and results["mlx_mtp"]["peak_bytes"] <= bound,
    }


@command
@option("--size-gb", default=1.0, help="Size of the float16 model.")
@option("--repeats", default=3, type=click.IntRange(min=1), help="Number of pairs.")
def main(size_gb: float, repeats: int) -> dict[str, Any]:
    """Time conversions by mlx-mtp and by mlx-lm and print one JSON line."""
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-bench.") as name:
        folder = Path(name)
        source = folder / "model"
        source.mkdir()
        # In its own process: the peak of a child includes the memory of its parent at the start.
        make = f"from mlx_mtp.lab.convert import make_model as m; m(*{(str(source), size_gb)})"
        subprocess.run([sys.executable, "-c", make], check=True)
        sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
        print(f"model: {sum(sizes) / 1e9:.2f} GB, largest shard {max(sizes) / 1e9:.2f} GB")
        runs = measure(folder, source, repeats=repeats)
    result = summary(runs, largest_shard_bytes=max(sizes))
    ours, theirs = (result["results"][name]["median_s"] for name in ("mlx_mtp", "mlx_lm"))
    print(f"mlx_mtp {ours:.2f} s, mlx_lm {theirs:.2f} s, ratio {result['ratio']:.2f}")
    return result | {"model_bytes": sum(sizes), "repeats": repeats} | machine_info("transformers")


if __name__ == "__main__":
    main()
