"""Traces and curves for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_mtp.planning.costs import CostCurve
from mlx_mtp.simulate.trace import Trace, TracedAnswer

ACCEPT_PROBS = (
    0.66,
    0.64,
    0.68,
    0.70,
    0.75,
    0.78,
    0.76,
    0.75,
)  # about those of the included adapter
CURVE = CostCurve(
    rows=(1, 4, 8, 16, 30),
    contexts=(0, 200),
    forward_ms=((10, 11, 14, 22, 40), (12, 14, 18, 28, 50)),
    draft_ms=(0.0, 0.5, 0.6, 0.7, 0.8),
)


def synthetic(
    accept_probs: Sequence[float] = ACCEPT_PROBS,
    *,
    answers: int = 20,
    tokens: int = 64,
    seed: int = 0,
    shares: Sequence[float] | None = None,
) -> Trace:
    """A stationary trace: each draft has a fixed acceptance probability after accepted ones."""
    rng, k, traced = np.random.default_rng(seed), len(accept_probs), []
    for index in range(answers):
        accepted = np.cumprod(
            rng.uniform(size=(tokens - 1, k)) < np.array(accept_probs), axis=1
        ).sum(1)
        counts = np.minimum(accepted, np.arange(tokens - 1, 0, -1)).tolist()
        traced.append(TracedAnswer(f"a{index}", ("one", "two")[index % 2], 50, tuple(counts)))
    prior = tuple(np.cumprod(accept_probs).tolist()) if shares is None else tuple(shares)
    return Trace(answers=tuple(traced), num_draft_tokens=k, max_tokens=tokens, shares=prior)
