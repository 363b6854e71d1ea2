"""Layout options: what a checkpoint does not contain, specified as ``KEY=VALUE``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mtp.model.config import SAMPLER_NORMS, SAMPLER_RESIDUALS

CONCATS = ("embedding-hidden", "hidden-embedding")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parsed layout options; None if not specified.

    Attributes:
        num_draft_tokens: k.
        mask_token_ids: vocabulary ids whose embedding rows are the mask rows, in drafting order.
        seed: seed of the random ids that serve as mask rows.
        noise_ids: (low, high) of the ids that are drawn for mask rows in every step.
        alpha, rank, scale: of the low-rank weights; by default the scale is alpha / rank.
        concat: order of the two halves of the sampler head's input.
        norm: normalisation of the sampler head, ``layer`` or ``rms``.
        norm_eps: epsilon of this normalisation.
        residual: what is added to the sampler head's output; see ``SamplerKind``.
        masks: name of the tensor of mask embeddings.
    """

    num_draft_tokens: int | None = None
    mask_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    noise_ids: tuple[int, int] | None = None
    alpha: float | None = None
    rank: int | None = None
    scale: float | None = None
    concat: str | None = None
    norm: str | None = None
    norm_eps: float | None = None
    residual: str | None = None
    masks: str | None = None

    @classmethod
    def parse(cls, values: Mapping[str, str], *, layout: str, allowed: frozenset[str]) -> Options:
        """Parse options from text.

        Raises:
            ValueError: the layout does not accept the key, or the value is wrong.
        """
        parsed: dict[str, Any] = {}
        for key, text in values.items():
            if key not in _PARSERS:
                raise ValueError(f"unknown layout option {key!r}; there are {', '.join(_PARSERS)}")
            if key not in allowed:
                raise ValueError(
                    f"layout {layout} has no option {key!r}; it has {', '.join(sorted(allowed))}"
                )
            try:
                parsed[key] = _PARSERS[key](text)
            except ValueError as error:
                raise ValueError(f"layout option {key} {error}, got {text!r}") from None
        return cls(**parsed)


def _whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) >= minimum):
            raise ValueError(f"must be a whole number of at least {minimum}")
        return int(text)

    return parse


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(_whole(0)(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError("must list token ids, separated by commas") from None


def _range(text: str) -> tuple[int, int]:
    low, high = (*_ids(text), 0, 0)[:2]
    if text.count(",") != 1 or low >= high:
        raise ValueError("must be LOW,HIGH with LOW below HIGH")
    return low, high


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _epsilon(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise ValueError("must be 0 or more")
    return value


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "num_draft_tokens": _whole(1),
    "mask_token_ids": _ids,
    "seed": _whole(0),
    "noise_ids": _range,
    "alpha": _number,
    "rank": _whole(1),
    "scale": _number,
    "concat": _one_of(CONCATS),
    "norm": _one_of(SAMPLER_NORMS),
    "norm_eps": _epsilon,
    "residual": _one_of(SAMPLER_RESIDUALS),
    "masks": str,
}
OPTION_KEYS = tuple(_PARSERS)
