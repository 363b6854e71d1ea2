"""The model card of a folder that was written from a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_mtp.storage.cards import CARD_FILE, is_hub_id, model_card
from mlx_mtp.storage.gguf.convert import GGUFResult
from mlx_mtp.storage.gguf.file import GGUFFile
from mlx_mtp.storage.safetensors import shown

# Where files name the model that they were made from, the most specific first.
_SOURCES = (
    "general.source.repo_url",
    "general.source.huggingface.repository",
    "general.base_model.0.repo_url",
    "general.repo_url",
)


def model_name(file: GGUFFile) -> str:
    """Return the hub id of the model that a file was made from, else its name, else the file's."""
    for key in _SOURCES:
        value = file.metadata.get(key)
        if isinstance(value, str):
            name = re.sub(r"^https?://(www\.)?huggingface\.co/", "", value.strip()).strip("/")
            if is_hub_id(name):
                return name
    value = file.metadata.get("general.name")
    return shown(value) if isinstance(value, str) and value.strip() else file.path.stem


def facts(file: GGUFFile, result: GGUFResult) -> list[str]:
    """Return paragraphs of a card: the file, and what became of its types."""
    lines = [f"Its tensors, from the GGUF file {file.path.name}:", ""]
    return ["\n".join(lines + [f"- {line}" for line in result.types])]


def write_card(folder: Path, file: GGUFFile, result: GGUFResult) -> None:
    """Write ``README.md`` into a model folder."""
    name = model_name(file)
    card = model_card(
        kind="model",
        base_model=name,
        licence=result.licence,
        facts=[f"Converted to MLX by mlx-mtp from {name}.", *facts(file, result)],
        usage=["mlx_lm.generate --model FOLDER --prompt TEXT"],
        tags=[result.model_type],
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
