"""A GGUF file as the source of a conversion, and its description."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.storage.gguf.card import facts, model_name, write_card
from mlx_mtp.storage.gguf.convert import check_model, float_type, type_lines, write_model
from mlx_mtp.storage.gguf.file import read_gguf
from mlx_mtp.storage.safetensors import shown
from mlx_mtp.terminal import progress


@dataclass(frozen=True, kw_only=True)
class OpenedGGUF:
    """A GGUF file that was written as a model folder.

    Attributes:
        folder: the model folder, with the file's licence in its card.
        name: the name of the model, a hub id if the file has one.
        types: one line per type of tensor: how many there are and what happened to them.
        facts: the same as paragraphs of a card.
    """

    folder: Path
    name: str
    types: tuple[str, ...]
    facts: tuple[str, ...]


@contextlib.contextmanager
def opened_gguf(
    path: Path, scratch: Path, *, keep: bool, floats: str | None
) -> Iterator[OpenedGGUF]:
    """Write a GGUF file as a model folder for ``convert_base``.

    Args:
        path: the file.
        scratch: an existing folder, in which the model's folder is made.
        keep: keep quantised tensors packed; False writes all values as ``floats``.
        floats: type of values that are not packed; by default the file's.

    Raises:
        ValueError: the file cannot be converted.  Errors of the block that name the model's folder
            name the file instead.
    """
    file = read_gguf(path)
    folder = scratch / "gguf"
    folder.mkdir()
    with progress(total=file.num_bytes, desc="Reading", unit="B", unit_scale=True) as bar:
        result = write_model(file, folder, floats=floats, keep=keep, written=bar.update)
    write_card(folder, file, result)
    try:
        yield OpenedGGUF(
            folder=folder,
            name=model_name(file),
            types=result.types,
            facts=tuple(facts(file, result)),
        )
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), str(path))) from None


def describe_gguf(path: Path) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Describe a GGUF file; no tensor is read.

    Returns:
        The kind, ``model`` or ``unknown``; labels and values; what a conversion would refuse.
    """
    try:
        file = read_gguf(path)
    except ValueError as error:
        return "unknown", {}, (str(error),)
    values = file.metadata
    arch, tokens = values.get("general.architecture"), values.get("tokenizer.ggml.tokens")
    kind, problems = "model", ()
    try:
        check_model(file)
    except ValueError as error:
        is_model = f"{arch}.block_count" in values and values.get("general.type") in (None, "model")
        kind, problems = "model" if is_model else "unknown", (str(error),)
    tokenizer = (values.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    found = {
        "format": "GGUF" if len(file.paths) == 1 else f"GGUF in {len(file.paths)} files",
        "architecture": arch,
        "name": model_name(file),
        "license": values.get("general.license"),
        "layers": values.get(f"{arch}.block_count"),
        "hidden_size": values.get(f"{arch}.embedding_length"),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "context": values.get(f"{arch}.context_length"),
        "tokenizer": ", ".join(name for name in tokenizer if isinstance(name, str)),
        "tensors": list(type_lines(file, floats=float_type(file))),
        "num_bytes": file.num_bytes,
        "usable": "no, see below" if problems else "yes, it is converted when it is first used",
    }
    plain = {  # a broken file may have anything in place of a number or a name
        label: value if isinstance(value, int | str | list | None) else shown(value)
        for label, value in found.items()
    }
    return kind, plain, problems
