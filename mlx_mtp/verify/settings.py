"""Settings of the ``verify`` command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mtp.decoding.config import setting
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.planning.plan import LAYOUTS, TREE

COPY = "copy"  # drafts from a copy of the answer, without mask tokens
WITH_ADAPTER = ("linear", "quadratic", TREE, "auto")
SPECULATIVE = (*(layout for layout in LAYOUTS if layout != "plain"), COPY)
DEFAULT_MAX_TOKENS = 48
DEFAULT_COPY_DEPTH = 8  # drafts per step of a model without an adapter
Way = tuple[str, int]
"""A layout and a number of draft tokens."""
DEFAULT_SAMPLING = (Sampling(temp=1.0), Sampling(temp=0.7, top_p=0.9, top_k=40))

QUICK_PROMPTS = 2
QUICK: dict[str, Any] = {"max_tokens": 12, "num_draws": 20, "sampling": DEFAULT_SAMPLING[1:]}
QUICK_LAYOUT, QUICK_DEPTH = "quadratic", 2  # of the quick check's draws


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings of a verification; see the ``help`` of each field.

    Attributes:
        layouts: None means all that the model has: linear, quadratic, tree and auto with an
            adapter, else copy.
        depths: empty means 1, 2 and the adapter's k (the quick check: k alone), 8 for a model
            without an adapter.
        max_tokens: None means 48, or no limit if ``num_tokens`` is set.
        num_tokens: the remaining tokens are divided evenly among the remaining prompts.
        sampling: settings of the sampling check; empty skips it.
        is_quick: whether this is the quick check (``quick``).

    Raises:
        ValueError: a value is out of range.
    """

    layouts: tuple[str, ...] | None = setting(
        None,
        "Layouts to verify, separated by commas.",
        default_text="linear,quadratic,tree,auto; copy without an adapter",
    )
    depths: tuple[int, ...] = setting(
        (),
        "Numbers of draft tokens per step to verify, separated by commas.",
        flag="--num-draft-tokens",
    )
    max_tokens: int | None = setting(
        None,
        "Maximum number of tokens to generate per prompt.",
        default_text=f"{DEFAULT_MAX_TOKENS}, or no limit with --num-tokens",
    )
    num_tokens: int | None = setting(
        None, "Total number of tokens to compare, divided among the prompts."
    )
    against_stock: bool = setting(True, "Also compare with mlx-lm.")
    sampling: tuple[Sampling, ...] = DEFAULT_SAMPLING
    num_draws: int = setting(100, "Number of draws per sampling setting, layout and depth.")
    seed: int = setting(0, "Random seed of the draws.", min=0, max=2**31)
    is_quick: bool = False

    def __post_init__(self) -> None:
        layouts = WITH_ADAPTER if self.layouts is None else self.layouts
        unknown = [layout for layout in layouts if layout not in SPECULATIVE]
        if unknown or not layouts:
            raise ValueError(
                f"layouts must be among {', '.join(SPECULATIVE)}, got {unknown or 'none'}"
            )
        for name in ("max_tokens", "num_tokens", "num_draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if any(depth < 1 for depth in self.depths):
            raise ValueError(f"depths must be at least 1, got {min(self.depths)}")
        if any(sampling.greedy for sampling in self.sampling):
            raise ValueError("sampling settings must have a temp above 0")

    @classmethod
    def quick(cls, **chosen: Any) -> VerifySettings:
        """Settings of the quick check; ``chosen`` replaces some of them."""
        return cls(is_quick=True, **QUICK | chosen)

    def ways_for(self, k: int, *, name: str) -> list[Way]:
        """Layouts and depths to verify.

        Args:
            k: mask tokens of the adapter; 0 without an adapter.
            name: name of the model, for messages.

        Raises:
            ValueError: a layout needs an adapter, or a depth exceeds its k.
        """
        layouts = self.layouts or (WITH_ADAPTER if k else (COPY,))
        needing = [layout for layout in layouts if layout != COPY]
        if needing and not k:
            raise ValueError(
                f"{name} has no MTP adapter, which layout {needing[0]} needs: --layouts {COPY} "
                "verifies it without"
            )
        depths = self.depths_for(k)
        return [(layout, depth) for layout in layouts for depth in depths]

    def sampled_ways(self, ways: Sequence[Way]) -> list[Way]:
        """Layouts and depths whose draws are tested, one in the quick check.

        Drafts from a copy are for greedy answers only.
        """
        drafting = [way for way in ways if way[0] != COPY] if self.sampling else []
        if not (self.is_quick and drafting):
            return drafting
        layouts, depths = zip(*drafting, strict=True)
        layout = QUICK_LAYOUT if QUICK_LAYOUT in layouts else layouts[0]
        return [(layout, min(QUICK_DEPTH, *depths))]

    def tokens_per_prompt(self, num_prompts: int, *, done: int = 0) -> int:
        """Maximum number of tokens of each of the remaining prompts, after ``done`` tokens."""
        limit, budget = self.max_tokens, 0
        if self.num_tokens is not None:
            budget = max(1, math.ceil((self.num_tokens - done) / num_prompts))
        if limit is None and budget:
            return budget
        limit = limit or DEFAULT_MAX_TOKENS
        return min(budget or limit, limit)

    def depths_for(self, k: int) -> tuple[int, ...]:
        """Depths to verify with an adapter of k mask tokens, or with none, in ascending order."""
        if not k:
            return tuple(sorted(set(self.depths))) or (DEFAULT_COPY_DEPTH,)
        default = (k,) if self.is_quick else (1, 2, k)
        depths = tuple(sorted(set(self.depths or default)))
        if not self.depths:
            return tuple(depth for depth in depths if depth <= k)
        if depths[-1] > k:
            raise ValueError(f"depth {depths[-1]} exceeds the adapter's number of mask tokens, {k}")
        return depths
