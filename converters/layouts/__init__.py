"""Layouts of adapter checkpoints: detection, and conversion to an adapter of mlx-mtp.

``LAYOUTS`` maps names to layouts; ``storage.contents.layout_of`` decides which of them it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlx_mtp.converters.layouts import glora, peft, state_dict
from mlx_mtp.converters.layouts.common import (
    BaseFacts,
    ConvertedAdapter,
    Layout,
    LayoutSummary,
    check_adapter,
)
from mlx_mtp.converters.layouts.options import OPTION_KEYS, Options
from mlx_mtp.converters.layouts.peft_export import to_peft
from mlx_mtp.storage.contents import layout_of

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint

__all__ = [
    "LAYOUTS",
    "OPTION_KEYS",
    "BaseFacts",
    "ConvertedAdapter",
    "Layout",
    "LayoutSummary",
    "convert_layout",
    "describe",
    "recognise",
    "to_peft",
]

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="peft-mtp",
            looks_for="adapter_config.json with peft_type and mask tokens or a sampler.mlp",
            options=frozenset({"mask_token_ids", "num_draft_tokens"}),
            convert=peft.convert_peft_mtp,
            describe=peft.describe_peft_mtp,
        ),
        Layout(
            name="peft-lora",
            looks_for="adapter_config.json with peft_type and neither",
            options=frozenset({"num_draft_tokens", "mask_token_ids", "noise_ids"}),
            convert=peft.convert_peft_lora,
            describe=peft.describe_peft_lora,
        ),
        Layout(
            name="mtp-glora",
            looks_for="lora_A.weight with draft_length and lora_rank in config.json, or with "
            "sampler_head.layers",
            options=frozenset({"mask_token_ids", "num_draft_tokens", "alpha", "rank", "norm_eps"}),
            convert=glora.convert_glora,
            describe=glora.describe_glora,
        ),
        Layout(
            name="state-dict",
            looks_for="lora_A and lora_B under any name",
            options=frozenset(OPTION_KEYS),
            convert=state_dict.convert_state_dict,
            describe=state_dict.describe_state_dict,
        ),
    )
}
_NAMES_SHOWN = 3
_LONGEST_NAME = 512  # names are matched by patterns whose time grows with the square of this


def recognise(checkpoint: Checkpoint, *, layout: str | None = None) -> str:
    """Return the name of a checkpoint's layout.

    Args:
        checkpoint: contents of its files.
        layout: name of the layout if the user specified it.

    Raises:
        ValueError: there is no such layout, or the checkpoint has none of them; the message lists
            what was looked for and what was found.
    """
    longest = max(
        (name for names in checkpoint.files.values() for name in names), key=len, default=""
    )
    if len(longest) > _LONGEST_NAME:
        raise ValueError(f"{checkpoint.path}: tensor {longest[:60]}... has too long a name")
    if layout is not None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
        return layout
    if any(config.get("fine_tune_type") == "mtp" for config in checkpoint.configs.values()):
        raise ValueError(f"{checkpoint.path} is an adapter of mlx-mtp already")
    if found := layout_of(checkpoint.configs, checkpoint.tensors):
        return found
    looked_for = "; ".join(f"{name}: {entry.looks_for}" for name, entry in LAYOUTS.items())
    raise ValueError(
        f"{checkpoint.path} has no known layout. Looked for {looked_for}. "
        f"Found {_contents(checkpoint)}"
    )


def convert_layout(
    checkpoint: Checkpoint,
    base: BaseFacts,
    *,
    layout: str | None = None,
    options: Mapping[str, str] | None = None,
) -> ConvertedAdapter:
    """Convert a checkpoint to an adapter of mlx-mtp and check it against its base model.

    Args:
        checkpoint: contents of its files.
        base: facts about its base model.
        layout: name of its layout; detected if None.
        options: layout options as text; ``OPTION_KEYS`` lists the keys.

    Raises:
        ValueError: an option is wrong, or the checkpoint contains something unknown or
            unsupported or does not fit the base model; one line that names it.
    """
    entry = LAYOUTS[recognise(checkpoint, layout=layout)]
    parsed = Options.parse(options or {}, layout=entry.name, allowed=entry.options)
    adapter = entry.convert(checkpoint, base, parsed)
    if parsed.num_draft_tokens not in (None, adapter.num_draft_tokens):
        raise ValueError(
            f"layout option num_draft_tokens is {parsed.num_draft_tokens}, but the checkpoint has "
            f"{adapter.num_draft_tokens} mask tokens"
        )
    check_adapter(adapter, base)
    return adapter


def describe(checkpoint: Checkpoint, *, layout: str | None = None) -> LayoutSummary:
    """Describe a checkpoint without its base model; problems are returned, not raised.

    Args:
        checkpoint: contents of its files.
        layout: name of the layout if the user specified it.
    """
    try:
        return LAYOUTS[recognise(checkpoint, layout=layout)].describe(checkpoint)
    except ValueError as error:
        return LayoutSummary(layout=None, problems=(str(error),))


def _contents(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's files and a few tensor names, for a message."""
    files = sorted({*checkpoint.files, *checkpoint.configs})
    names = sorted(name for tensors in checkpoint.files.values() for name in tensors)
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    listed = ", ".join(files[:_NAMES_SHOWN]) or "no files"
    return f"{listed}; {len(names)} tensors" + (f": {shown}{more}" if shown else "")
