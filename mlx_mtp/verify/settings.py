"""Settings of the ``verify`` command."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mtp.decoding.config import setting
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.planning.plan import LAYOUTS

SPECULATIVE = tuple(layout for layout in LAYOUTS if layout != "plain")
DEFAULT_MAX_TOKENS = 48
DEFAULT_SAMPLING = (Sampling(temp=1.0), Sampling(temp=0.7, top_p=0.9, top_k=40))


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings of a verification; see the ``help`` of each field.

    Attributes:
        depths: empty means 1, 2 and the adapter's k.
        max_tokens: None means 48, or no limit if ``num_tokens`` is set.
        num_tokens: the remaining tokens are divided evenly among the remaining prompts.
        sampling: settings of the sampling check; empty skips it.

    Raises:
        ValueError: a value is out of range.
    """

    layouts: tuple[str, ...] = setting(
        ("linear", "quadratic", "auto"), "Layouts to verify, separated by commas."
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

    def __post_init__(self) -> None:
        unknown = [layout for layout in self.layouts if layout not in SPECULATIVE]
        if unknown or not self.layouts:
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

    def depths_for(self, k: int) -> tuple[int, ...]:
        """Depths to verify with an adapter of k mask tokens, in ascending order."""
        depths = tuple(sorted(set(self.depths or (1, 2, k))))
        if not self.depths:
            return tuple(depth for depth in depths if depth <= k)
        if depths[-1] > k:
            raise ValueError(f"depth {depths[-1]} exceeds the adapter's number of mask tokens, {k}")
        return depths
