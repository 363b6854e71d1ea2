"""What a machine does with the attention of few rows; a part of the doctor's report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.metal.attention_choice import (
    RACE_LAYERS,
    Arrays,
    MetalAttention,
    check_attention,
    race_attention,
    random_attention,
)
from mlx_mtp.backends.metal.attention_layer import AttentionKey, attention_keys
from mlx_mtp.backends.metal.matmul import MAX_ROWS

KEYS = 1024
ROUNDS = 3

Say = Callable[[str], None]


def examine_attention(
    base: nn.Module, *, rows: Sequence[int], has_metal: bool, say: Say = lambda text: None
) -> list[dict[str, Any]]:
    """Check our attention and time rows over 1024 keys, for each shape that has a kernel.

    Args:
        base: the model.
        rows: numbers of rows to time.
        has_metal: whether ours can run; else stock MLX is timed alone.
        say: called with a line about what is going on.
    """
    found = []
    for key in attention_keys(base):
        say(f"Examining {key.name} ...")
        problem = check_attention(key, MetalAttention()) if has_metal else ""
        check = {"passed": not problem, "problem": problem} if has_metal else None
        ours = has_metal and not problem
        found.append(
            {"shape": f"{key.name}, {KEYS} keys", "check": check} | _times(key, rows, ours)
        )
    return found


def _times(key: AttentionKey, rows: Sequence[int], ours: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer by number of rows, with stock MLX and with ours."""
    most = max(max(rows), 1)
    layers = [
        random_attention(key, rows=most, count=KEYS, seed=seed) for seed in range(RACE_LAYERS)
    ]
    times: dict[str, dict[str, float]] = {"stock_ms": {}, "ours_ms": {}}
    for each in rows:
        fits = ours and each <= MAX_ROWS
        mine, stock = _race(layers, each, fits)
        times["stock_ms"][str(each)] = stock
        if ours:
            times["ours_ms"][str(each)] = mine
    return times


def _race(layers: Sequence[Arrays], rows: int, ours: bool) -> tuple[float, float]:
    """Milliseconds of ours (of stock MLX, where ours takes no such rows) and of stock MLX."""
    runner: Any = MetalAttention() if ours else _StockTwice()
    rounds = [race_attention(layers, runner, rows=rows, count=KEYS) for _ in range(ROUNDS)]
    mine, stock = (statistics.median(each) for each in zip(*rounds, strict=True))
    return mine * 1e3 / len(layers), stock * 1e3 / len(layers)


class _StockTwice(MetalAttention):
    """Stock MLX where ours would be."""

    def ours(self, queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        return self.stock(queries, keys, values, **options)
