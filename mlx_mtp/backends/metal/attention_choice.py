"""Whether our kernels or stock MLX attend from few rows, decided on the machine that will do it.

As for the layers: ours are taken where they pass a self-check against float32 operations, where a
row has the same bits whatever the number of rows beside it, and where they win a short race.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

from mlx_mtp.backends.metal.attention import Mask, step_attention_kernel, step_attention_ops
from mlx_mtp.backends.metal.attention_layer import AttentionKey
from mlx_mtp.backends.metal.checks import FLOAT32_BOUND, HALF_ULP, MetalRunner
from mlx_mtp.backends.metal.choice import AS_FAST, KernelChoice, Mode
from mlx_mtp.model.layout import linear_layout

CHECK_ROWS = (1, 2, 3, 5, 8, 16, 32)
CHECK_KEYS = (1, 33, 128, 129, 700)
RACE_ROWS = (1, 8, 16)
RACE_KEYS = (512, 4096)
RACE_LAYERS = 4  # one alone would stay in the GPU's cache

Arrays = tuple[mx.array, mx.array, mx.array]


class AttentionRunner(Protocol):
    """Where attention runs; tests put one without a GPU here."""

    def ours(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask
    ) -> mx.array:
        """Our kernel's result; RuntimeError, now or at its evaluation, where it cannot run."""
        ...

    def stock(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask
    ) -> mx.array:
        """MLX's result."""
        ...

    def seconds(self, calls: Callable[[], list[mx.array]]) -> float:
        """Time some calls that are evaluated together."""
        ...


class MetalAttention:
    """This machine's GPU."""

    def ours(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask
    ) -> mx.array:
        """Our kernel's result."""
        return step_attention_kernel(queries, keys, values, scale=scale, mask=mask)

    def stock(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask
    ) -> mx.array:
        """MLX's result."""
        return step_attention_ops(queries, keys, values, scale=scale, mask=mask)

    def seconds(self, calls: Callable[[], list[mx.array]]) -> float:
        """Median over a few rounds, after one to compile and warm."""
        return MetalRunner().seconds(calls)


def choose_attention(
    key: AttentionKey,
    *,
    mode: Mode,
    runner: AttentionRunner,
    seconds_left: Callable[[], float] = lambda: float("inf"),
) -> KernelChoice:
    """Decide for one shape.

    Args:
        key: the shape.
        mode: ``stock`` and ``ours`` decide without a race; ours must still pass the self-check.
        runner: where to check and race.
        seconds_left: time that the race may still take; without any, stock MLX stays.
    """
    if mode == "stock":
        return KernelChoice(ours=False, why="asked for")
    if mode == "auto" and seconds_left() <= 0:
        return KernelChoice(ours=False, why="no time was left for the race")
    if problem := check_attention(key, runner):
        return KernelChoice(ours=False, why=problem)
    return KernelChoice(ours=True, why="asked for") if mode == "ours" else _race(key, runner)


def check_attention(
    key: AttentionKey,
    runner: AttentionRunner,
    *,
    rows: Sequence[int] = CHECK_ROWS,
    counts: Sequence[int] = CHECK_KEYS,
) -> str:
    """Compare our kernel with float32 operations, and rows with one another.

    Args:
        key: the shape.
        runner: where to run.
        rows: numbers of rows to try.
        counts: numbers of keys to try.

    Returns:
        What is wrong; nothing if nothing is.
    """
    try:
        for count in counts:
            for each in (number for number in rows if number <= count):
                given = random_attention(key, rows=each, count=count)
                mask = step_mask(each, count)
                y = runner.ours(*given, scale=_scale(key), mask=mask)
                if not _is_near(y, _reference(*given, scale=_scale(key), mask=mask)):
                    return f"attention is wrong at {each} rows and {count} keys"
        return _check_bits(key, runner, rows=rows, count=max(counts))
    except Exception as error:  # threadgroups too large, a compiler that refuses, no Metal
        return f"attention does not run: {(str(error).splitlines() or [type(error).__name__])[0]}"


def _check_bits(
    key: AttentionKey, runner: AttentionRunner, *, rows: Sequence[int], count: int
) -> str:
    """Whether a row that rides along has the bits that it has alone."""
    queries, keys, values = random_attention(key, rows=max(rows), count=count)
    first = count - max(rows)

    def result(begin: int, end: int, mask: Mask) -> mx.array:
        held = (keys[..., : first + end, :], values[..., : first + end, :])
        return runner.ours(queries[:, :, begin:end], *held, scale=_scale(key), mask=mask)

    for each in rows:
        together = result(0, each, "causal")
        for row in {0, each // 2, each - 1}:
            alone = result(row, row + 1, None)
            if not mx.array_equal(alone[:, :, 0], together[:, :, row]).item():
                return f"attention gives other bits at {each} rows"
    return ""


def _race(key: AttentionKey, runner: AttentionRunner) -> KernelChoice:
    """Time ours and stock MLX; ours must not lose at one row and must win over several."""
    layers = [
        random_attention(key, rows=max(RACE_ROWS), count=max(RACE_KEYS), seed=seed)
        for seed in range(RACE_LAYERS)
    ]
    ratios: dict[int, float] = {}
    for rows in RACE_ROWS:
        found = []
        for count in RACE_KEYS:
            ours, stock = race_attention(layers, runner, rows=rows, count=count)
            found.append(ours / max(stock, 1e-9))
        ratios[rows] = max(found)
    several = statistics.mean(ratio for rows, ratio in ratios.items() if rows > 1)
    wins = ratios[1] <= AS_FAST and several < 1.0
    why = "won the race" if wins else "stock won the race"
    return KernelChoice(ours=wins, why=why, ratios=ratios)


def race_attention(
    layers: Sequence[Arrays], runner: AttentionRunner, *, rows: int, count: int
) -> tuple[float, float]:
    """Seconds that some layers take with ours and with stock MLX, at so many rows and keys."""
    some = [
        (queries[:, :, :rows], keys[..., :count, :], values[..., :count, :])
        for queries, keys, values in layers
    ]
    mask = step_mask(rows, count)
    mx.eval(some, mask)
    scale = layers[0][0].shape[-1] ** -0.5
    return (
        runner.seconds(lambda: [runner.ours(*each, scale=scale, mask=mask) for each in some]),
        runner.seconds(lambda: [runner.stock(*each, scale=scale, mask=mask) for each in some]),
    )


def random_attention(key: AttentionKey, *, rows: int, count: int, seed: int = 0) -> Arrays:
    """Queries ``[1, H, M, D]`` and keys and values ``[1, Hkv, N, D]``."""
    seeds = mx.random.split(mx.random.key(seed), 3)
    sizes = ((key.heads, rows), (key.kv_heads, count), (key.kv_heads, count))
    queries, keys, values = (
        mx.random.normal((1, *size, key.head_dim), key=each).astype(key.dtype)
        for size, each in zip(sizes, seeds, strict=True)
    )
    return queries, keys, values


def step_mask(rows: int, count: int) -> mx.array | None:
    """The mask of a step, half of whose rows are mask rows; None for one row."""
    if rows == 1:
        return None
    masks = rows // 2
    layout = linear_layout(num_pending=1, num_draft_tokens=rows - 1 - masks, num_masks=masks)
    return mx.pad(layout.attention, [(0, 0), (count - rows, 0)], constant_values=True)


def _reference(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | None
) -> mx.array:
    """``[1, H, M, D]`` in float32 operations."""
    shared_by = queries.shape[1] // keys.shape[1]
    queries = queries.astype(mx.float32) * scale
    keys, values = (
        mx.repeat(each.astype(mx.float32), shared_by, axis=1) for each in (keys, values)
    )
    scores = queries @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -float("inf"))
    return mx.softmax(scores, axis=-1) @ values


def _is_near(y: mx.array, wanted: mx.array) -> bool:
    bound = FLOAT32_BOUND * mx.abs(wanted).max() + HALF_ULP[y.dtype] * mx.abs(wanted)
    # The operations of the reference may round as much again.
    return bool(mx.all(mx.abs(y.astype(mx.float32) - wanted) <= 2 * bound).item())


def _scale(key: AttentionKey) -> float:
    return key.head_dim**-0.5
