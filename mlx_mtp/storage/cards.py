"""Model cards: ``README.md`` with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_mtp.model.config import MTPConfig

CARD_FILE = "README.md"

_MAX_CARD_BYTES = 1 << 20
_TITLES = {
    "model": "{} in MLX",
    "adapter": "Multi-token prediction for {}",
    "bundle": "{} in MLX, with multi-token prediction",
}
_TAGS = {
    "model": ("mlx",),
    "adapter": ("mlx", "mlx-mtp", "multi-token-prediction", "speculative-decoding", "lora"),
    "bundle": ("mlx", "mlx-mtp", "multi-token-prediction", "speculative-decoding"),
}
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*")
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def read_licence(folder: Path) -> str | None:
    """Return the licence that a folder's own card names, as the hub writes it; None without one."""
    licence = _front_matter(folder / CARD_FILE).get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    named = isinstance(licence, str) and licence.strip() and licence.isprintable()
    return licence.strip() if named and isinstance(licence, str) else None


def model_card(
    *,
    kind: str,
    base_model: str,
    licence: str | None,
    facts: Sequence[str],
    usage: Sequence[str],
    tags: Sequence[str] = (),
) -> str:
    """Return a model card.

    Args:
        kind: ``model``, ``adapter`` or ``bundle``.
        base_model: hub id, or a plain name, which the front matter leaves out: the hub would look
            for it.
        licence: as the hub writes it; None leaves it out.
        facts: paragraphs.
        usage: command lines.
        tags: beyond those that every card of the kind has.
    """
    assert kind in _TITLES
    front: dict[str, Any] = {"library_name": "mlx"}
    if is_hub_id(base_model):
        front["base_model"] = base_model
        if kind == "adapter":
            front["base_model_relation"] = "adapter"
    if licence is not None:
        front["license"] = licence
    front["pipeline_tag"] = "text-generation"
    front["tags"] = list(dict.fromkeys([*_TAGS[kind], *tags]))
    title = _TITLES[kind].format(" ".join(base_model.split()))
    blocks = ["---", *_yaml(front), "---", "", f"# {title}", ""]
    for fact in facts:
        blocks += [fact, ""]
    if usage:
        blocks += ["```", *usage, "```", ""]
    return "\n".join(blocks)


def is_hub_id(name: str) -> bool:
    """Tell whether a model's name can be a hub id."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(rf"{part}/{part}", name) is not None and ".." not in name


def adapter_facts(config: MTPConfig) -> str:
    """Say in a paragraph what an adapter is."""
    sampler = "a sampler head" if config.sampler else "no sampler head"
    return (
        f"An mlx-mtp adapter: {config.num_draft_tokens} mask tokens, gated LoRA of rank "
        f"{config.rank} on {', '.join(config.target_modules)}, and {sampler}. The base model "
        "drafts several tokens a step with it and checks them itself, so the output stays "
        "the base model's own."
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """Read the front matter of a card; an empty one if there is none that can be read."""
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode(errors="replace").lstrip("\ufeff")
        match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
        values = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _yaml(values: Mapping[str, Any]) -> list[str]:
    """Write front matter; JSON's strings are YAML's too."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            value = f"[{', '.join(_scalar(item) for item in value)}]"
        else:
            value = _scalar(value)
        lines.append(f"{key}: {value}")
    return lines


def _scalar(text: str) -> str:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)
