"""Files of other libraries next to a tokenizer."""

from __future__ import annotations

from pathlib import Path

from mlx_mtp.storage.safetensors import read_json_object

PROCESSOR_TEMPLATE = "chat_template.json"


def sidecar_template(folder: Path) -> dict[str, str]:
    """Return the chat template that a processor saved in ``chat_template.json``.

    transformers reads that file for processors only, so a tokenizer loaded alone lacks it.  A
    template that belongs to the tokenizer itself takes precedence.

    Returns:
        An option of the tokenizer, ``chat_template``, or nothing.

    Raises:
        ValueError: the file is broken.
    """
    path, config = folder / PROCESSOR_TEMPLATE, folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "chat_template.jinja").is_file():
        return {}
    if config.is_file() and read_json_object(config).get("chat_template"):
        return {}
    template = read_json_object(path).get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f"{path} has no chat_template")
    return {"chat_template": template}
