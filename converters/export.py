"""Export an adapter as a PEFT checkpoint, for PyTorch.

The folder has the layout of PEFT pull request 3541: LoRA weights, trained mask tokens, the sampler
head, and the base model's tokenizer with the additional tokens ``<mask_1>`` to ``<mask_k>``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.converters.base.facts import find_base
from mlx_mtp.converters.convert import check_output, output_folder
from mlx_mtp.converters.layouts import to_peft
from mlx_mtp.loading import read_adapter, resolve_adapter
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.storage.cards import CARD_FILE, is_hub_id

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_SAMPLER_FILE = "sampler_model.safetensors"


def export_adapter(
    adapter_path: str, output: Path, *, base_model: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Write an adapter in the layout of PEFT pull request 3541.

    Args:
        adapter_path: adapter folder or hub id.
        output: the new folder.
        base_model: folder or hub id of the base model, for its tokenizer; by default the one that
            the adapter names.
        force: replace ``output`` if it is an adapter folder or empty.

    Returns:
        PEFT's ``adapter_config.json`` as it was written.

    Raises:
        ValueError: the layout cannot express the adapter, or a folder cannot be read
            or written; the message names it.
    """
    check_output(output, force=force, inputs=[adapter_path, base_model])
    folder = resolve_adapter(adapter_path)
    config, tensors = read_adapter(folder)
    _, base = find_base(base_model, named=config.base_model, checkpoint=folder)
    tokenizer, mask_ids = _with_mask_tokens(base, config)
    try:
        settings, weights, sampler = to_peft(config, tensors, mask_token_ids=mask_ids)
    except ValueError as error:
        raise ValueError(f"{adapter_path}: {error}") from None
    with output_folder(output, force=force) as draft:
        tokenizer.save_pretrained(draft)
        mx.save_safetensors(str(draft / PEFT_WEIGHTS_FILE), weights, {"format": "pt"})
        if sampler is not None:
            mx.save_safetensors(str(draft / PEFT_SAMPLER_FILE), sampler, {"format": "pt"})
        (draft / CARD_FILE).write_text(_card(config), encoding="utf-8")
        text = json.dumps(settings, indent=2) + "\n"
        (draft / PEFT_CONFIG_FILE).write_text(text, encoding="utf-8")
    return settings


def _card(config: MTPConfig) -> str:
    """Return the model card of the checkpoint."""
    base = [f"base_model: {config.base_model}"] if is_hub_id(config.base_model) else []
    return "\n".join(
        [
            "---",
            "library_name: peft",
            *base,
            "tags: [multi-token-prediction, lora]",
            "---",
            "",
            f"# Multi-token prediction for {config.base_model}",
            "",
            f"Written by mlx-mtp from an adapter of {config.num_draft_tokens} mask tokens, in the "
            "layout of PEFT pull request 3541. The LoRA weights are for mask tokens only: applied "
            "to every token they would change the output. The tokenizer in this folder has the "
            "mask tokens; the model needs rows for them before PEFT loads the adapter:",
            "",
            "```python",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model.resize_token_embeddings(len(tokenizer))",
            "model = PeftModel.from_pretrained(model, folder, is_trainable=True)",
            "```",
            "",
        ]
    )


def _with_mask_tokens(base: Path, config: MTPConfig) -> tuple[Any, list[int]]:
    """Return the base model's tokenizer with the mask tokens added, and their ids.

    Raises:
        ValueError: the tokenizer cannot be loaded, or it already has a token of this name.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # transformers raises many kinds for a broken folder
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the tokenizer in {base}: {reason}") from None
    names = [f"<mask_{index + 1}>" for index in range(config.num_draft_tokens)]
    if existing := [name for name in names if name in tokenizer.get_vocab()]:
        raise ValueError(f"the tokenizer in {base} already has a token {existing[0]}")
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids(names)
