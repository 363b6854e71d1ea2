"""Alpha, rank and scale of a raw state dict: looked for in whatever was saved beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_mtp.converters.layouts.options import Options

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint

# What the last part of a key may be called.
_KEYS = {
    "alpha": {"alpha", "lora_alpha"},
    "rank": {"r", "rank", "lora_r", "lora_rank"},
    "scale": {"scale", "scaling", "lora_scale", "lora_scaling"},
    "rslora": {"use_rslora", "rslora", "lora_use_rslora"},
    "base_model": {
        "base_model", "base_model_name", "base_model_name_or_path", "model_name",
        "model_name_or_path", "model_path",
    },
}  # fmt: skip
_TRAINING = ("optim", "sched", "lr_sched", "scaler", "grad_scaler", "rng")
_OF_MODELS = ("architectures", "model_type")  # keys that tell a base model's config.json


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """What was found, None where nothing was; ``problems`` tells what contradicts itself."""

    alpha: float | None
    rank: int | None
    scale: float | None
    rslora: bool | None
    base_model: str | None
    problems: tuple[str, ...]

    def of_layer(self, rank: int, options: Options) -> float:
        """Scale of a layer of that rank.

        Raises:
            ValueError: it is not known.
        """
        if options.scale is not None:
            return options.scale
        alpha = self.alpha if options.alpha is None else options.alpha
        if alpha is None and self.scale is None:
            raise ValueError(
                "neither alpha nor scale is in the checkpoint; give one as a layout option"
            )
        if alpha is None:
            assert self.scale is not None
            return self.scale
        plain, rooted = alpha / rank, alpha / math.sqrt(rank)
        if options.alpha is not None or self.scale is None or self.rslora is not None:
            return rooted if self.rslora else plain
        if self.scale not in (plain, rooted):
            raise ValueError(
                f"the checkpoint says alpha {alpha} and scale {self.scale}, which do not go "
                f"together at rank {rank}; give scale as a layout option"
            )
        return self.scale


def is_training_state(name: str) -> bool:
    """Whether a dotted name is of an optimiser, a scheduler or a random generator."""
    return any(part.lower().startswith(_TRAINING) for part in name.split(".")[:-1])


def find_settings(checkpoint: Checkpoint) -> StateSettings:
    """Look through the plain values of PyTorch files and the JSON files beside them."""
    found: dict[str, dict[Any, str]] = {word: {} for word in _KEYS}
    problems = []
    for name, value in _entries(checkpoint):
        *owners, leaf = name.lower().split(".")
        if "alpha_pattern" in owners:
            problems.append(f"{name} is not supported in a raw state dict")
        for word, keys in _KEYS.items():
            if leaf in keys and _fits(word, value):
                found[word].setdefault(value, name)
    chosen: dict[str, Any] = {}
    for word, values in found.items():
        chosen[word] = next(iter(values), None)
        if len(values) > 1 and word != "base_model":
            listed = ", ".join(f"{name} {value}" for value, name in values.items())
            problems.append(f"the checkpoint contradicts itself: {listed}")
    return StateSettings(**chosen, problems=tuple(problems))


def _fits(word: str, value: Any) -> bool:
    if word == "base_model":
        return isinstance(value, str) and bool(value)
    if word == "rslora":
        return isinstance(value, bool)
    if word == "rank":
        return type(value) is int and value > 0
    return type(value) in (int, float) and abs(value) < 2**1000


def _entries(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    for name, value in checkpoint.values.items():
        if not is_training_state(name):
            yield name, value
    for config in checkpoint.configs.values():
        if not any(key in config for key in _OF_MODELS):
            yield from _flatten(config, "")


def _flatten(config: Mapping[str, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 8:
            yield from _flatten(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
