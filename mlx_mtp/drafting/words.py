"""Drafters in words, for the lines that commands print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mlx_mtp.planning.plan import DRAFT_MODEL, HEADS, LOOKUP, MASK, NATIVE

_WORDS = {
    MASK: "mask tokens",
    NATIVE: "the model's MTP modules",
    HEADS: "heads",
    DRAFT_MODEL: "a draft model",
    LOOKUP: "lookup",
}


def in_words(sources: Sequence[str]) -> str:
    """Name drafters, such as "mask tokens and lookup"; "" for none."""
    words = [_WORDS[source] for source in sources]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def what_would_help(model: str, *, num_lost_modules: int = 0) -> str:
    """What a model needs to draft more than it can look up, in one line.

    Args:
        model: folder or hub id, for the command.
        num_lost_modules: MTP modules that its configuration announces and its folder lacks.
    """
    means = [f"an adapter (mlx-mtp train --model {shlex.quote(model)})"]
    if num_lost_modules:
        means.insert(0, "its MTP modules (mlx-mtp convert keeps those of the original)")
    means.append("a smaller model with the same tokenizer (--draft-model)")
    return f"hint: {model} could draft more with {', '.join(means[:-1])} or {means[-1]}"
