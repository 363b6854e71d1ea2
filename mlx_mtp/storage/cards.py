"""Model cards: ``README.md`` with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def read_licence(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's card; None if it names none."""
    licence = _front_matter(folder / CARD_FILE).get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if not isinstance(licence, str) or not licence.isprintable():
        return None
    return licence.strip() or None


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
        base_model: hub id or a plain name; only a hub id goes into the front matter, because the
            hub looks it up.
        licence: as the hub writes it; None omits it.
        facts: paragraphs.
        usage: command lines.
        tags: in addition to those that every card of the kind has.
    """
    from huggingface_hub import ModelCardData  # slow to import, and most commands write no card

    base: dict[str, Any] = {"base_model": base_model} if is_hub_id(base_model) else {}
    if base and kind == "adapter":
        base["base_model_relation"] = "adapter"
    front = ModelCardData(
        library_name="mlx",
        license=licence,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*_TAGS[kind], *tags])),
        **base,
    )
    title = _TITLES[kind].format(" ".join(base_model.split()))
    blocks = ["---", front.to_yaml(), "---", "", f"# {title}", ""]
    for fact in facts:
        blocks += [fact, ""]
    if usage:
        blocks += ["```", *usage, "```", ""]
    return "\n".join(blocks)


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be a hub id."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(rf"{part}/{part}", name) is not None and ".." not in name


def _front_matter(path: Path) -> dict[str, Any]:
    """Read the front matter of a card; empty if there is none or it cannot be read."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode(errors="replace").lstrip("\ufeff")
        match = REGEX_YAML_BLOCK.match(text)
        values = yaml.safe_load(match[2]) if match else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
