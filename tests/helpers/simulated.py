"""Traces and curves for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_mtp.planning.costs import CostCurve
from mlx_mtp.simulate.trace import Trace, TracedAnswer

CHANCES = (0.66, 0.64, 0.68, 0.70, 0.75, 0.78, 0.76, 0.75)  # about the shipped adapter's
CURVE = CostCurve(
    rows=(1, 4, 8, 16, 30),
    contexts=(0, 200),
    forward_ms=((10, 11, 14, 22, 40), (12, 14, 18, 28, 50)),
    draft_ms=(0.0, 0.5, 0.6, 0.7, 0.8),
)


def synthetic(
    chances: Sequence[float] = CHANCES,
    *,
    answers: int = 20,
    tokens: int = 64,
    seed: int = 0,
    shares: Sequence[float] | None = None,
) -> Trace:
    """A stationary trace: each draft holds with its own chance if those before it do."""
    rng, k, made = np.random.default_rng(seed), len(chances), []
    for at in range(answers):
        holds = np.cumprod(rng.uniform(size=(tokens - 1, k)) < np.array(chances), axis=1).sum(1)
        counts = np.minimum(holds, np.arange(tokens - 1, 0, -1)).tolist()
        made.append(TracedAnswer(f"a{at}", ("one", "two")[at % 2], 50, tuple(counts)))
    told = tuple(np.cumprod(chances).tolist()) if shares is None else tuple(shares)
    return Trace(answers=tuple(made), num_draft_tokens=k, max_tokens=tokens, shares=told)
