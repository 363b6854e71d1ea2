"""``adapter_config.json`` of PEFT's LoRA.

PEFT has many options that change what a layer computes.  Supported ones are read; those without
effect on a finished checkpoint are ignored; any other that is set, also one of a future version, is
refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.converters.layouts.common import HEAD

EMBEDDING = "embed_tokens"

_READ = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "trainable_token_indices", "alora_invocation_tokens", "modules_to_save",
    "bias", "init_lora_weights", "block_size",
}  # fmt: skip
# How an adapter was initialised, trained or placed: the tensors already reflect it.
_WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Initialisations that do not change the base model; others (PiSSA, OLoRA, LoftQ, ...) do.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT matches patterns as regular expressions, so a hostile one could run for hours.
_MAX_PATTERNS = 4096
_MAX_REPEATS = 2
_MAX_OPTIONAL = 6
_MAX_BRANCHES = 100_000


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """The relevant settings of a configuration.

    Attributes:
        rank, alpha, use_rslora: of the low-rank weights.
        rank_pattern, alpha_pattern: regular expression to value, in order.
        trained: ids of the trained token rows, in row order; None if none were trained.
        order: ids of the mask tokens in drafting order; None if unknown.
        base_model: name of the base model.
        head_saved: whether the unembedding was trained and saved whole.
        block_size: tokens of a block of training, drafts and the sure one; None if unknown.
    """

    rank: int = 1
    alpha: float = 1.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trained: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    base_model: str | None = None
    head_saved: bool = False
    block_size: int | None = None

    def rank_of(self, layer: str) -> int:
        """Return the rank of the layer with this Hugging Face module path."""
        return _by_pattern(self.rank_pattern, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        """Return the scale of the layer with this Hugging Face module path."""
        return self.scale(self.rank_of(layer), _by_pattern(self.alpha_pattern, layer, self.alpha))

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor of the low-rank product by PEFT's formula."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value of the first pattern that matches, by PEFT's rules."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def read_settings(config: Mapping[str, Any]) -> tuple[PeftSettings, list[str]]:
    """Read a configuration.

    Returns:
        The settings, with defaults instead of wrong values, and the problems.
    """
    problems = _unsupported(config)
    trained = _trained(config, problems)
    order = config.get("alora_invocation_tokens")
    base_model = config.get("base_model_name_or_path")
    settings = PeftSettings(
        rank=_rank("r", config.get("r"), problems),
        alpha=_alpha("lora_alpha", config.get("lora_alpha"), problems),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=_pattern("rank_pattern", config, _rank, problems),
        alpha_pattern=_pattern("alpha_pattern", config, _alpha, problems),
        trained=trained,
        order=_token_ids("alora_invocation_tokens", order, problems) if order else None,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        head_saved=HEAD in str(config.get("modules_to_save")),
        block_size=size if type(size := config.get("block_size")) is int else None,
    )
    if settings.trained and settings.order and sorted(settings.trained) != sorted(settings.order):
        problems.append(
            f"alora_invocation_tokens {list(settings.order)} and trainable_token_indices "
            f"{list(settings.trained)} must be the same tokens"
        )
    return settings, problems


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for key in sorted(set(config) - _READ - _WITHOUT_EFFECT):
        if config[key]:
            problems.append(f"{key} is not supported, got {_short(config[key])}")
    if config.get("bias") not in (None, "none"):
        problems.append(f"bias must be 'none', got {config['bias']!r}")
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_INITS:
        problems.append(f"init_lora_weights {_short(start)} changes the base model's weights")
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    for module in saved if isinstance(saved, list) else [saved]:
        if not isinstance(module, str) or module.rpartition(".")[2] not in (EMBEDDING, HEAD):
            problems.append(f"modules_to_save {_short(module)} is not supported")
    return problems


def _trained(config: Mapping[str, Any], problems: list[str]) -> tuple[int, ...] | None:
    """Return the ids of the trained tokens; a tied unembedding may be named as well."""
    trained = config.get("trainable_token_indices")
    if not trained:
        return None
    if not isinstance(trained, Mapping):
        return _token_ids("trainable_token_indices", trained, problems)
    tables = {name.rpartition(".")[2]: ids for name, ids in trained.items()}
    if EMBEDDING not in tables or set(tables) - {EMBEDDING, HEAD}:
        problems.append(
            f"trainable_token_indices must name only {EMBEDDING}, got {', '.join(trained)}"
        )
        return None
    if tables.get(HEAD, tables[EMBEDDING]) != tables[EMBEDDING]:
        problems.append("trainable_token_indices names other tokens for lm_head")
    return _token_ids("trainable_token_indices", tables[EMBEDDING], problems)


def _token_ids(key: str, ids: Any, problems: list[str]) -> tuple[int, ...] | None:
    whole = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
    if not whole or len(set(ids)) != len(ids):
        problems.append(
            f"{key} must list the ids of the mask tokens without repetition, got {_short(ids)}"
        )
        return None
    return tuple(ids)


def _rank(key: str, value: Any, problems: list[str]) -> int:
    if type(value) is int and 1 <= value < 2**31:
        return value
    problems.append(f"{key} must be a whole number of at least 1, got {_short(value)}")
    return 1


def _alpha(key: str, value: Any, problems: list[str]) -> float:
    # Not converted: dividing an integer rounds once, converting it first might round twice.
    if type(value) in (int, float) and abs(value) < 2**1000:
        return value
    problems.append(f"{key} must be a number, got {_short(value)}")
    return 1.0


def _pattern(key: str, config: Mapping[str, Any], read: Any, problems: list[str]) -> dict[str, Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping) or len(patterns) > _MAX_PATTERNS:
        problems.append(f"{key} must be an object of at most {_MAX_PATTERNS} patterns")
        return {}
    values = {}
    for pattern, value in patterns.items():
        if reason := _unsafe(pattern):
            problems.append(f"{key}: pattern {_short(pattern)} {reason}")
        else:
            values[pattern] = read(f"{key}: {pattern}", value, problems)
    return values


def _unsafe(pattern: str) -> str | None:
    """Return why a pattern must not be matched, or None; all usual layer names pass."""
    plain = re.sub(r"\\.", "", pattern)
    branches = (plain.count("|") + 1) ** plain.count("(")
    repeats = len(re.findall(r"[*+{]", plain))
    if repeats > _MAX_REPEATS or plain.count("?") > _MAX_OPTIONAL or branches > _MAX_BRANCHES:
        return "is too costly to match"
    if re.search(r"\)[*+{]", plain):
        return "repeats a group, which can be too costly to match"
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return "is no regular expression"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
