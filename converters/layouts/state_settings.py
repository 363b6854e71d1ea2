"""Alpha, rank and scale of a raw state dict, from the values and files that come with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_mtp.converters.layouts.options import Options

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint

# Possible names of the last part of a key.
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
_OF_MODELS = ("architectures", "model_type")  # keys of a base model's config.json


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """The settings of a checkpoint, None if missing; ``problems`` lists contradictions."""

    alpha: float | None
    rank: int | None
    scale: float | None
    rslora: bool | None
    base_model: str | None
    problems: tuple[str, ...]

    def of_layer(self, rank: int, options: Options) -> float:
        """Return the scale of a layer of this rank.

        Raises:
            ValueError: it is unknown.
        """
        if options.scale is not None:
            return options.scale
        alpha = self.alpha if options.alpha is None else options.alpha
        if alpha is None and self.scale is None:
            raise ValueError(
                "the checkpoint contains neither alpha nor scale: specify one as a layout option"
            )
        if alpha is None:
            assert self.scale is not None
            return self.scale
        plain, rooted = alpha / rank, alpha / math.sqrt(rank)
        if options.alpha is not None or self.scale is None or self.rslora is not None:
            return rooted if self.rslora else plain
        if self.scale not in (plain, rooted):
            raise ValueError(
                f"alpha {alpha} and scale {self.scale} of the checkpoint contradict each other at "
                f"rank {rank}: specify layout option scale"
            )
        return self.scale


def is_training_state(name: str) -> bool:
    """Return whether a dotted name belongs to an optimiser, scheduler or random generator."""
    return any(part.lower().startswith(_TRAINING) for part in name.split(".")[:-1])


def find_settings(checkpoint: Checkpoint) -> StateSettings:
    """Search the plain values of PyTorch files and the JSON files next to them."""
    values_by_word: dict[str, dict[Any, str]] = {word: {} for word in _KEYS}
    problems = []
    for name, value in _entries(checkpoint):
        *owners, leaf = name.lower().split(".")
        if "alpha_pattern" in owners:
            problems.append(f"{name} is not supported in a raw state dict")
        for word, keys in _KEYS.items():
            if leaf in keys and _fits(word, value):
                values_by_word[word].setdefault(value, name)
    chosen: dict[str, Any] = {}
    for word, values in values_by_word.items():
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
