"""Options of the command ``generate`` together: the ids of ``--no-mtp``, or one line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mlx_mtp.cli.main import cli
from tests.helpers.pairwise import pairwise
from tests.helpers.tiny import save_tiny_pair, tiny_base
from tests.test_options_together import FACTORS, SIZES

HEAD = [257, *b"A beginning that is in a file."]
FLAGS: dict[str, list[str]] = {
    "adapter": ["", "--adapter-path A"],
    "layout": ["--layout quadratic", "--layout linear", "--layout auto", "--layout plain"],
    "drafts": ["", "--num-draft-tokens 1", "--num-draft-tokens 0"],
    "lookup": ["", "--no-lookup"],
    "kv": [
        "", "--kv-bits 8 --quantized-kv-start 0", "--kv-bits 4 --quantized-kv-start 40",
        "--kv-bits 4 --kv-group-size 32 --quantized-kv-start 0",
    ],
    "size": ["", "--max-kv-size 16", "--max-kv-size 600"],
    "file": ["", "--prompt-cache-file full", "--prompt-cache-file quantised"],
    "chunk": ["", "--prefill-step-size 5"],
    "sampling": [
        "", "--temp 0.8 --seed 3", "--temp 1 --top-p 0.9 --top-k 20 --seed 3",
        "--temp 1 --xtc-probability 0.5 --xtc-threshold 0.05 --seed 1",
    ],
    "penalty": ["", "--repetition-penalty 1.5", "--logit-bias 65=3 --logit-bias 66=-100"],
    "thinking": ["", "--thinking-budget 3", "--no-enable-thinking"],
    "template": ["", "--ignore-chat-template", "--system-prompt S --prefill-response Oh"],
    "end": ["", "--stop 3 --stop ab", "--extra-eos-token 65 66"],
}  # fmt: skip
KINDS = {"kind": FACTORS["kind"], "dtype": ["float32", "bfloat16"]}
ROWS = pairwise(KINDS | FLAGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model_folders(root: Path, kind: str, dtype: str) -> tuple[Path, Path]:
    """A model and its adapter; next to it are up to two prompt cache files."""
    model, adapter = save_tiny_pair(root / f"{kind}-{dtype}", kind, **SIZES)
    path = model / "model.safetensors"
    tensors: Any = mx.load(str(path))
    cast = {name: value.astype(getattr(mx, dtype)) for name, value in tensors.items()}
    mx.eval(cast)
    mx.save_safetensors(str(path), cast, metadata={"format": "mlx"})
    base = tiny_base(kind, **SIZES)
    caches = make_prompt_cache(base)
    base(mx.array([HEAD]), cache=caches)
    about = {"model": str(model), "tokenizer_config": "{}"}
    save_prompt_cache(str(model.parent / "full.safetensors"), caches, about)
    if all(hasattr(layer, "to_quantized") and not hasattr(layer, "keep") for layer in caches):
        caches = [layer.to_quantized(group_size=32, bits=8) for layer in caches]
        save_prompt_cache(str(model.parent / "quantised.safetensors"), caches, about)
    return model, adapter


def answer(row: dict[str, str], folder: Path, *more: str) -> tuple[int, Any]:
    """Exit code, and the text and ids or the line on stderr."""
    model, adapter = model_folders(folder, row["kind"], row["dtype"])
    flags = " ".join(row[name] for name in FLAGS).split()
    places = {"A": str(adapter)} | {
        name: str(model.parent / f"{name}.safetensors") for name in ("full", "quantised")
    }
    flags = [places.get(flag, flag) for flag in flags]
    arguments = ["generate", "--model", str(model), "-p", "Tell me, tell me.", "-m", "12"]
    result = CliRunner().invoke(cli, [*arguments, "--json", *flags, *more])
    if result.exit_code == 2:
        assert result.stderr.splitlines()[-1].startswith("Error: ") and not result.stdout, row
        return 2, result.stderr.splitlines()[-1]
    assert result.exit_code == 0, (row, result.output, result.exception)
    found = json.loads(result.stdout)
    return 0, (found["tokens"], found["text"], found["finish_reason"])


def check(rows: list[dict[str, str]], folder: Path) -> int:
    """Compare with plain decoding, and sampled answers with themselves; count the answers."""
    count = 0
    for row in rows:
        code, found = answer(row, folder)
        count += code == 0
        if not row["sampling"] or code:
            assert (code, found) == answer(row, folder, "--no-mtp"), row
        elif row["layout"] != "--layout auto":
            assert (code, found) == answer(row, folder), row
    return count


def test_some_flags_together(folder: Path) -> None:
    assert check(ROWS[:8], folder) >= 3


@pytest.mark.soak
def test_every_pair_of_flags(folder: Path, seed: int) -> None:
    rows = ROWS + pairwise(KINDS | FLAGS, seed=seed)
    assert check(rows, folder) > len(rows) // 3
