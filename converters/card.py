"""Model cards of converted folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_mtp.model.config import MTPConfig
from mlx_mtp.storage.cards import model_card

if TYPE_CHECKING:
    from mlx_mtp.converters.base.model import BaseResult


def adapter_card(config: MTPConfig, *, licence: str | None, notes: Sequence[str] = ()) -> str:
    """Return the card of an adapter folder.

    Args:
        config: configuration of the adapter.
        licence: hub identifier of the licence.
        notes: assumptions of the conversion, one line per item.
    """
    assumed = ["\n".join(["Assumed in the conversion:", "", *(f"- {note}" for note in notes)])]
    return model_card(
        kind="adapter",
        base_model=config.base_model,
        licence=licence,
        facts=[
            config.describe(),
            *(assumed if notes else []),
            "It acts on mask rows only and cannot be fused; mlx-lm does not load it.",
        ],
        usage=[f"mlx-mtp generate --model {config.base_model} --adapter-path FOLDER --prompt TEXT"],
    )


def base_card(
    name: str,
    result: BaseResult | None,
    *,
    adapter: MTPConfig | None,
    licence: str | None,
    facts: Sequence[str] = (),
) -> str:
    """Return the card of a converted base model, with its adapter if it has one.

    Args:
        name: hub id or plain name of the model.
        result: result of the conversion.
        adapter: configuration of the adapter in ``adapter/``.
        licence: hub identifier of the licence.
        facts: more paragraphs about the model.
    """
    first = f"Converted to MLX by mlx-mtp from {name}."
    if result is not None:
        first = f"Converted to MLX by mlx-mtp from {name}: {result.summary}."
    facts = [first, *facts]
    native = None if result is None else result.native
    if native is not None:
        facts += [f"{line[0].upper()}{line[1:]}." for line in native.lines()]
    usage = ["mlx_lm.generate --model FOLDER --prompt TEXT"]
    if adapter is not None:
        facts += [f"In `adapter/`: {adapter.describe()}"]
    if adapter is not None or (native is not None and native.num_modules):
        usage = ["mlx-mtp generate --model FOLDER --prompt TEXT"]
    return model_card(
        kind="model" if adapter is None else "bundle",
        base_model=name,
        licence=licence,
        facts=facts,
        usage=usage,
        tags=[] if result is None else [result.model_type],
    )
