"""Whether our kernels or stock MLX multiply few rows, decided on the machine that will do it.

A weight's shape is decided as a whole, for 1 to 32 rows: plain decoding (one row) and verification
(several) then use the same kernels, whose rows have the same bits whatever their number.  Ours are
taken where they pass a self-check against float32 and win a short race; stock MLX everywhere else,
and wherever anything goes wrong.
"""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.backends.metal.checks import Runner, self_check
from mlx_mtp.backends.metal.matmul import MATRIX_MIN_ROWS, MAX_ROWS, PackedWeight, Variant

SWITCH = "MLX_MTP_KERNELS"
Mode = Literal["auto", "ours", "stock"]
MODES: tuple[Mode, ...] = ("auto", "ours", "stock")

RACE_ROWS = (1, 4, 8, 16)
AS_FAST = 1.02  # of stock's time at one row, where plain decoding must not suffer

# Whether the matrix variant is tried, by generation of the GPU (M1 = 13 ... M5 = 17).  Of the
# newest one it was reported that a small matrix kernel can stall it, so there it must be asked for.
MATRIX_BY_GENERATION = {13: True, 14: True, 15: True, 16: True}


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """What multiplies how many rows by the weights of one shape.

    Attributes:
        ours: whether our kernels do, for 1 to 32 rows; else stock MLX.
        matrix_from: rows from which the matrix variant does; 0 is never.
        simdgroups: of the matrix variant.
        gated: whether it may add gated low-rank weights; stock MLX does otherwise.
        why: in a few words.
        ratios: time of ours over stock's, by number of rows, as far as it was raced.
    """

    ours: bool
    matrix_from: int = 0
    simdgroups: int = 16
    gated: bool = False
    why: str = ""
    ratios: dict[int, float] = dataclasses.field(default_factory=dict)

    def variant(self, rows: int) -> Variant | None:
        """The kernel for so many rows; None is stock MLX."""
        if not self.ours or not 1 <= rows <= MAX_ROWS:
            return None
        return "matrix" if self.matrix_from and rows >= self.matrix_from else "scalar"


def kernel_mode() -> Mode:
    """What ``MLX_MTP_KERNELS`` asks for; ``auto`` without it.

    Raises:
        ValueError: it asks for something else.
    """
    asked = os.environ.get(SWITCH, "auto")
    for mode in MODES:
        if asked == mode:
            return mode
    raise ValueError(f"{SWITCH} is {asked!r}; it may be {', '.join(MODES)}")


def gpu_generation(architecture: str) -> int | None:
    """The generation in a name such as ``applegpu_g15p``: M1 is 13, M5 is 17."""
    found = re.search(r"applegpu_g(\d+)", architecture)
    return int(found.group(1)) if found else None


def choose(
    weights: Sequence[PackedWeight],
    *,
    mode: Mode,
    runner: Runner,
    generation: int | None,
    seconds_left: Callable[[], float] = lambda: float("inf"),
) -> KernelChoice:
    """Decide for one shape.

    Args:
        weights: the model's weights of that shape, of different layers: one alone would stay in
            the GPU's cache during the race.
        mode: ``stock`` and ``ours`` decide without a race; ours must still pass the self-check.
        runner: where to check and race.
        generation: of the GPU, from ``gpu_generation``.
        seconds_left: time that the race may still take; without any, stock MLX stays.
    """
    if mode == "stock":
        return KernelChoice(ours=False, why="asked for")
    if not weights[0].is_supported:
        return KernelChoice(ours=False, why="no kernel for these weights")
    if mode == "auto" and seconds_left() <= 0:
        return KernelChoice(ours=False, why="no time was left for the race")
    checked = self_check(weights[0], runner)
    if not checked.scalar:
        return KernelChoice(ours=False, why=checked.problem)
    may_matrix = mode == "ours" or MATRIX_BY_GENERATION.get(generation or 0, False)
    simdgroups = checked.matrix if may_matrix else 0
    if mode == "ours":
        return KernelChoice(
            ours=True,
            matrix_from=MATRIX_MIN_ROWS if simdgroups else 0,
            simdgroups=simdgroups or 16,
            gated=checked.gated,
            why="asked for",
        )
    return _race(weights, runner, simdgroups=simdgroups, gated=checked.gated)


def _race(
    weights: Sequence[PackedWeight], runner: Runner, *, simdgroups: int, gated: bool
) -> KernelChoice:
    """Time ours and stock MLX; ours must not lose at one row and must win over several."""
    first = weights[0]
    x = mx.random.normal((max(RACE_ROWS), first.shape[1]), key=mx.random.key(1))
    x = x.astype(first.scales.dtype)
    ratios: dict[int, float] = {}
    matrix_from = 0
    for rows in RACE_ROWS:
        some = x[:rows]
        mx.eval(some)
        stock = runner.seconds(lambda some=some: [runner.stock(some, each) for each in weights])
        ours = race_seconds(weights, runner, some, variant="scalar")
        if simdgroups and rows >= MATRIX_MIN_ROWS:
            matrix = race_seconds(weights, runner, some, variant="matrix", simdgroups=simdgroups)
            matrix_from = matrix_from or (rows if matrix < ours else 0)
            ours = matrix if matrix_from else ours
        ratios[rows] = ours / max(stock, 1e-9)
    several = [ratio for rows, ratio in ratios.items() if 1 < rows <= 8]
    wins = ratios[1] <= AS_FAST and statistics.mean(several) < 1.0
    return KernelChoice(
        ours=wins,
        matrix_from=matrix_from if wins else 0,
        simdgroups=simdgroups or 16,
        gated=gated,
        why="won the race" if wins else "stock won the race",
        ratios=ratios,
    )


def race_seconds(
    weights: Sequence[PackedWeight],
    runner: Runner,
    x: mx.array,
    *,
    variant: Variant,
    simdgroups: int = 16,
) -> float:
    """Time our kernel over the weights of one shape."""
    return runner.seconds(
        lambda: [runner.ours(x, each, variant=variant, simdgroups=simdgroups) for each in weights]
    )


def choice_to_dict(choice: KernelChoice) -> dict[str, Any]:
    """For a JSON file."""
    return dataclasses.asdict(choice)


def choice_from_dict(values: dict[str, Any]) -> KernelChoice:
    """From a JSON file.

    Raises:
        KeyError, TypeError, ValueError: the values are not those of a choice.
    """
    return KernelChoice(
        ours=bool(values["ours"]),
        matrix_from=int(values["matrix_from"]),
        simdgroups=int(values["simdgroups"]),
        gated=bool(values["gated"]),
        why=str(values["why"]),
        ratios={int(rows): float(ratio) for rows, ratio in values["ratios"].items()},
    )
