"""Settings of an answer and of its cache, each with the help text that the commands print.

A field's ``metadata`` has ``help`` and, where they apply, ``choices``, ``min`` and ``max``, so that
options can be generated from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from mlx_mtp.planning.plan import DRAFTERS, LAYOUTS


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field: its default, its help text, and its ``choices``, ``min`` or ``max``."""
    return field(default=default, metadata={"help": help, **limits})


def check_numbers(settings: Any) -> None:
    """Check the types of the numbers among the fields of a dataclass.

    Raises:
        ValueError: one has another type.
    """
    for item in fields(settings):
        value, (kind, *more) = getattr(settings, item.name), str(item.type).split(" | ")
        if kind not in ("int", "float") or (value is None and "None" in more):
            continue
        expected = Integral if kind == "int" else Real
        if isinstance(value, bool) or not isinstance(value, expected):
            what = "a whole number" if kind == "int" else "a number"
            raise ValueError(f"{item.name} must be {what}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Generation settings, except for sampling (``Sampling``).

    Attributes:
        max_tokens: maximum number of ids to emit; -1 sets no limit but the model's context.
        thinking_budget: maximum number of ids of reasoning, after which the closing mark is forced;
            used by the text functions only, and without effect where a model has no such marks.
        stop: strings that end the answer and are not part of it; used by the text functions only.
        seed: random seed; None draws one from mlx's global state.
        layout: ``"auto"``, ``"tree"``, ``"linear"``, ``"quadratic"`` or ``"plain"``.
        max_rows: maximum rows of a step with layout ``"tree"``.
        num_draft_tokens: maximum drafts per step; by default that of the drafter, k of an adapter.
        drafter: what proposes drafts; ``"auto"`` uses all that the model has the means for.
        lookup: whether ``"auto"`` may take drafts from the text so far.
        prefill_step_size: prompt rows per forward.

    Raises:
        ValueError: a value is out of range.
    """

    max_tokens: int = setting(256, "Maximum number of tokens to generate; -1 for no limit.")
    thinking_budget: int | None = setting(
        None, "Maximum number of tokens of reasoning, which is closed there.", min=0
    )
    stop: tuple[str, ...] = setting((), "Text that ends the answer; repeatable.")
    seed: int | None = setting(
        None, "Random seed; makes sampling repeatable.", min=0, max=2**63 - 1
    )
    layout: str = setting("auto", "Placement of mask tokens in a step.", choices=LAYOUTS)
    max_rows: int = setting(16, "Maximum number of rows per step with layout tree.", min=1)
    num_draft_tokens: int | None = setting(
        None, "Maximum number of draft tokens per step; by default that of the drafter.", min=0
    )
    drafter: str = setting(
        "auto", "Source of the draft tokens; all that the model has by default.", choices=DRAFTERS
    )
    lookup: bool = setting(
        True, "With layouts auto and tree, also look up drafts in the text so far."
    )
    prefill_step_size: int = setting(2048, "Prompt tokens per forward pass.", min=1)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not isinstance(self.stop, str | list | tuple):
            raise ValueError(f"stop must be text or a list of texts, got {self.stop!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) for text in stop):
            raise ValueError(f"stop must be text or a list of texts, got {self.stop!r}")
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        if self.max_tokens < -1 or self.max_tokens == 0:
            raise ValueError(
                f"max_tokens must be at least 1, or -1 for no limit, got {self.max_tokens}"
            )
        for name in ("max_rows", "num_draft_tokens", "prefill_step_size", "thinking_budget"):
            limit = _LIMITS[name]["min"]
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"{name} must be at least {limit}, got {value}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.drafter not in DRAFTERS:
            raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, got {self.drafter!r}")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How keys and values are cached; the arguments of ``MTPModel.make_cache``, which checks them.

    Attributes:
        max_kv_size: maximum number of rows in the cache; older ones are dropped.
        kv_bits: bits per element of a quantised cache; None does not quantise.
        kv_group_size: elements per scale of a quantised cache.
        quantized_kv_start: context length from which the cache is quantised.
    """

    max_kv_size: int | None = setting(None, "Maximum number of rows in the key-value cache.")
    kv_bits: int | None = setting(None, "Quantize the key-value cache to this number of bits.")
    kv_group_size: int = setting(64, "Group size for --kv-bits.")
    quantized_kv_start: int = setting(5000, "Context length from which --kv-bits applies.")

    def __post_init__(self) -> None:
        check_numbers(self)


_LIMITS = {setting.name: setting.metadata for setting in fields(GenerationConfig)}
