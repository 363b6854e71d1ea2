"""Conversion beside mlx-lm's own, as interleaved pairs: ``python -m mlx_mtp.lab.convert``.

A random float16 llama is quantised by ``mlx_lm.convert -q`` and by ``mlx-mtp convert -q``, each in
a process of its own, in turns and in alternating order.  Times are of whole processes; what is
reported is the median of the ratios of pairs.  Memory is the process's peak resident set, and the
page cache is warm for both: each file is read once before the clock starts.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np

from mlx_mtp.backends.cpu.blas import BLAS

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
        seconds: of the whole process.
        peak_bytes: its peak resident set.
    """

    seconds: float
    peak_bytes: int


def make_model(folder: str | Path, size_gb: float, *, seed: int = 0) -> None:
    """Write a random float16 llama with a byte-level tokenizer, in shards.

    Args:
        folder: an existing, empty folder.
        size_gb: about how many gigabytes it has in the end.
        seed: of the weights.
    """
    folder = Path(folder)
    attention = _HIDDEN * (_HIDDEN + _HIDDEN // _HEADS * _KV_HEADS) * 2
    per_layer = size_gb * 5e8 - 2 * _VOCAB * _HIDDEN
    width = max(64, round((per_layer / _LAYERS - attention) / (3 * _HIDDEN) / 64) * 64)
    (folder / "config.json").write_text(json.dumps(_config(width), indent=2), encoding="utf-8")
    _write_tokenizer(folder)
    _write_shards(folder, _shapes(width), seed=seed)


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


def _shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the model by name."""
    kv = _HIDDEN // _HEADS * _KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCAB, _HIDDEN)}
    for layer in range(_LAYERS):
        path = f"model.layers.{layer}"
        for name, rows in (("q", _HIDDEN), ("k", kv), ("v", kv), ("o", _HIDDEN)):
            shapes[f"{path}.self_attn.{name}_proj.weight"] = (rows, _HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{path}.mlp.{name}_proj.weight"] = (width, _HIDDEN)
        shapes[f"{path}.mlp.down_proj.weight"] = (_HIDDEN, width)
        for name in ("input", "post_attention"):
            shapes[f"{path}.{name}_layernorm.weight"] = (_HIDDEN,)
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCAB, _HIDDEN)}


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], *, seed: int) -> None:
    """Write random tensors in several files with an index."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * int(np.prod(shape))
        if groups[-1] and size + num_bytes > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    rng = np.random.default_rng(seed)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: mx.array(_random(rng, shapes[name])) for name in names}
        mx.save_safetensors(str(folder / file), tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (0.02 * rng.standard_normal(shape, dtype=np.float32)).astype(np.float16)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary filled up with words to its size."""
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
    """Run a conversion in a process of its own.

    Raises:
        ValueError: it fails; with the last line that it printed.
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
    """Convert in turns, in alternating order; the output is removed each time."""
    import shutil

    runs: dict[str, list[Run]] = {"mlx_lm": [], "mlx_mtp": []}
    for turn in range(repeats):
        for name in sorted(runs, reverse=turn % 2 == 1):
            for path in source.glob("*.safetensors"):
                _read_through(path)
            output = folder / "out"
            done = run(_commands(source, output)[name])
            runs[name].append(done)
            shutil.rmtree(output)
            print(f"{name}: {done.seconds:.2f} s, peak {done.peak_bytes / 1e9:.2f} GB")
    return runs


def _read_through(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def summary(runs: dict[str, list[Run]], *, largest_shard_bytes: int) -> dict[str, Any]:
    """Sum up: medians, the median ratio of pairs, peaks and whether the bounds hold."""
    pairs = zip(runs["mlx_mtp"], runs["mlx_lm"], strict=True)
    ratio = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
    results: dict[str, Any] = {
        name: {
            "median_s": round(statistics.median(run.seconds for run in done), 3),
            "peak_bytes": max(run.peak_bytes for run in done),
        }
        for name, done in runs.items()
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


@click.command()
@click.option("--size-gb", default=1.0, show_default=True, help="Size of the float16 model.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
def main(size_gb: float, repeats: int) -> None:
    """Time conversions beside mlx-lm's own and print one JSON line."""
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-bench.") as name:
        folder = Path(name)
        source = folder / "model"
        source.mkdir()
        # In a process of its own: a child's peak counts what its parent held when it was started.
        make = f"from mlx_mtp.lab.convert import make_model as m; m(*{(str(source), size_gb)})"
        subprocess.run([sys.executable, "-c", make], check=True)
        largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"model: {size / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB")
        result = summary(measure(folder, source, repeats=repeats), largest_shard_bytes=largest)
    ours, theirs = (result["results"][name]["median_s"] for name in ("mlx_mtp", "mlx_lm"))
    print(f"mlx_mtp {ours:.2f} s, mlx_lm {theirs:.2f} s, ratio {result['ratio']:.2f}")
    result |= {
        "model_bytes": size,
        "repeats": repeats,
        "blas": BLAS,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "transformers")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
