"""Covering arrays: few combinations of values in which every pair of values occurs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

CANDIDATES = 40


def pairwise(factors: Mapping[str, Sequence[Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Combinations with every pair of values of two factors, those with the most new pairs first.

    Greedy, as in AETG: of several random rows around a missing pair, take the best.
    """
    rng = random.Random(seed)
    indices = {name: range(len(values)) for name, values in factors.items()}
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(factors, 2)
        for i, j in product(indices[a], indices[b])
    }
    rows = []
    while missing:
        best: dict[str, int] = {}
        gained: set[Any] = set()
        for pair in rng.choices(sorted(missing), k=CANDIDATES):
            row = {name: rng.choice(values) for name, values in indices.items()} | dict(pair)
            pairs = set(combinations(row.items(), 2)) & missing
            if len(pairs) > len(gained):
                best, gained = row, pairs
        missing -= gained
        rows.append({name: factors[name][index] for name, index in best.items()})
    return rows
