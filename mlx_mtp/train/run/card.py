"""The model card of a trained adapter: facts, results, and how to train it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.model.config import LAYER, MLP, HeadsConfig, MTPConfig
from mlx_mtp.storage.cards import model_card

_COMMAND, _LICENCE = "command", "licence"
_METHOD = "Samragh et al. 2025, arXiv 2507.11851"
_HEADS_METHODS = {
    MLP: "Cai et al. 2024, arXiv 2401.10774",
    LAYER: "Gloeckle et al. 2024, arXiv 2404.19737",
}


def training_card(
    config: MTPConfig | HeadsConfig, *, recipe: Mapping[str, Any], best: Evaluation | None
) -> str:
    """Return ``README.md`` of an adapter folder.

    Args:
        config: the adapter's configuration.
        recipe: how it was trained, by the name to show: seed, data hash, hardware, time, versions
            and others.  ``command`` is the command line; ``licence``, a hub identifier, goes into
            the front matter.  Entries that are None or empty are omitted.
        best: its evaluation on held-out text, if any.
    """
    rest = {name: value for name, value in recipe.items() if name not in (_COMMAND, _LICENCE)}
    has_heads = isinstance(config, HeadsConfig)
    rows = [("method", _HEADS_METHODS[config.head] if has_heads else _METHOD)]
    rows += [(name, _cell(value)) for name, value in rest.items() if value not in (None, "")]
    training = ["## Training", "", *_table(["", ""], rows)]
    if command := recipe.get(_COMMAND):
        training += ["", "```", " ".join(str(command).split()), "```"]
    facts = [config.describe()]
    if best is not None:
        facts.append(_results(best))
    facts.append("\n".join(training))
    where = "next to the model" if has_heads else "on mask rows only"
    facts.append(f"The adapter acts {where} and cannot be fused; mlx-lm alone does not load it.")
    return model_card(
        kind="adapter",
        base_model=config.base_model,
        licence=recipe.get(_LICENCE),
        facts=facts,
        usage=[f"mlx-mtp generate --model {config.base_model} --adapter-path FOLDER --prompt TEXT"],
    )


def _results(best: Evaluation) -> str:
    """Tokens per step and acceptance by position."""
    positions = [str(position) for position in range(1, len(best.acceptance) + 1)]
    shares = [f"{share:.0%}" for share in best.acceptance]
    text = (
        f"On {best.num_tokens} tokens of {best.num_sequences} held-out sequences, greedy decoding "
        f"with new drafts at every step takes {best.num_steps} steps: "
        f"**{best.tokens_per_step:.2f} tokens per step**. Acceptance rate of a draft together "
        "with all drafts before it:"
    )
    table = _table(["draft", *positions], [("accepted", *shares)])
    return "\n".join([text, "", *table])


def _table(head: list[str], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(value: Any) -> str:
    """A value as one line, with | escaped."""
    return " ".join(str(value).split()).replace("|", "\\|")
