"""Whether our kernels or stock MLX compute an operation, decided on the machine that will do it.

A shape is decided as a whole, for 1 to 32 rows: plain decoding (one row) and verification (several)
then use the same kernels.  Ours are used where they pass the self-check and are faster in a short
benchmark; stock MLX is used everywhere else, and wherever anything goes wrong.
"""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_mtp.backends.metal.matmul import MATRIX_MIN_ROWS, MAX_ROWS, Variant
from mlx_mtp.backends.metal.operation import Kernel, Operation, Timer, check, median_seconds

SWITCH = "MLX_MTP_KERNELS"
Mode = Literal["auto", "ours", "stock"]
MODES: tuple[Mode, ...] = ("auto", "ours", "stock")

MAX_PLAIN_RATIO = 1.02  # of stock's time at one row: plain decoding must not become slower

# Whether the matrix variant is used, by generation of the GPU (M1 = 13 ... M5 = 17).  A small
# matrix kernel was reported to stall the newest one, so there it must be requested.
MATRIX_BY_GENERATION = {13: True, 14: True, 15: True, 16: True}


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """What computes how many rows of one operation.

    Attributes:
        ours: whether our kernels do, for 1 to 32 rows; else stock MLX.
        matrix_from: smallest number of rows for the matrix variant; 0 for never.
        simdgroups: of a threadgroup of the matrix variant.
        gated: whether our kernels may add gated low-rank weights; stock MLX does otherwise.
        why: the reason, in a few words.
        ratios: time of ours over stock's by number of rows, as far as it was benchmarked.
    """

    ours: bool
    matrix_from: int = 0
    simdgroups: int = 16
    gated: bool = False
    why: str = ""
    ratios: dict[int, float] = dataclasses.field(default_factory=dict)

    def variant(self, rows: int) -> Variant | None:
        """The kernel for so many rows; None for stock MLX."""
        if not self.ours or not 1 <= rows <= MAX_ROWS:
            return None
        return "matrix" if self.matrix_from and rows >= self.matrix_from else "scalar"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KernelChoice:
        """Build a choice from what ``dataclasses.asdict`` gave, read from JSON.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of a choice.
        """
        return cls(
            ours=bool(values["ours"]),
            matrix_from=int(values["matrix_from"]),
            simdgroups=int(values["simdgroups"]),
            gated=bool(values["gated"]),
            why=str(values["why"]),
            ratios={int(rows): float(ratio) for rows, ratio in values["ratios"].items()},
        )


def kernel_mode() -> Mode:
    """Read ``MLX_MTP_KERNELS``; ``auto`` if it is not set.

    Raises:
        ValueError: it has another value.
    """
    value = os.environ.get(SWITCH, "auto")
    for mode in MODES:
        if value == mode:
            return mode
    raise ValueError(f"{SWITCH} is {value!r}; it may be {', '.join(MODES)}")


def gpu_generation(architecture: str) -> int | None:
    """The generation in a name such as ``applegpu_g15p``: M1 is 13, M5 is 17."""
    match = re.search(r"applegpu_g(\d+)", architecture)
    return int(match.group(1)) if match else None


def choose(
    operation: Operation,
    *,
    mode: Mode,
    generation: int | None,
    timer: Timer = median_seconds,
    seconds_left: Callable[[], float] = lambda: float("inf"),
) -> KernelChoice:
    """Choose what computes an operation.

    Args:
        operation: the operation.
        mode: ``stock`` and ``ours`` need no benchmark; ours must still pass the self-check.
        generation: of the GPU, from ``gpu_generation``.
        timer: times calls.
        seconds_left: time left for benchmarks; stock MLX is kept if there is none.
    """
    if mode == "stock":
        return KernelChoice(ours=False, why="requested")
    if not operation.is_supported:
        return KernelChoice(ours=False, why="no kernel for this shape")
    if mode == "auto" and seconds_left() <= 0:
        return KernelChoice(ours=False, why="no time was left for the benchmark")
    checked = check(operation)
    if not checked.kernels:
        return KernelChoice(ours=False, why=checked.problem)
    may_use_matrix = mode == "ours" or MATRIX_BY_GENERATION.get(generation or 0, False)
    matrix = checked.matrix if may_use_matrix else None
    kernels = [checked.kernels[0], *([matrix] if matrix else [])]
    if mode == "ours":
        choice = KernelChoice(
            ours=True, matrix_from=MATRIX_MIN_ROWS if matrix else 0, why="requested"
        )
    else:
        choice = benchmark(operation, kernels, timer=timer)
    return dataclasses.replace(
        choice, gated=checked.gated, simdgroups=matrix.simdgroups if matrix else 16
    )


def benchmark(
    operation: Operation, kernels: Sequence[Kernel], *, timer: Timer = median_seconds
) -> KernelChoice:
    """Time our kernels and stock MLX; choose the faster ones.

    Ours must not be slower at one row and must be faster on average at the decisive numbers of
    rows; at each number of rows, the least favourable context counts.

    Args:
        operation: the operation.
        kernels: the scalar variant and, if it may be used, the matrix variant.
        timer: times calls.
    """
    ratios: dict[int, float] = {}
    matrix_from = 0
    for rows in operation.benchmark_rows:
        layers = [operation.benchmark_inputs(rows, context) for context in operation.contexts]
        stock = [_seconds(operation, inputs, None, timer) for inputs in layers]
        ours = [_seconds(operation, inputs, kernels[0], timer) for inputs in layers]
        if len(kernels) > 1 and rows >= kernels[1].min_rows:
            matrix = [_seconds(operation, inputs, kernels[1], timer) for inputs in layers]
            matrix_from = matrix_from or (rows if sum(matrix) < sum(ours) else 0)
            ours = matrix if matrix_from else ours
        ratios[rows] = max(a / max(b, 1e-9) for a, b in zip(ours, stock, strict=True))
    several = statistics.mean(ratios[rows] for rows in operation.decisive_rows)
    is_faster = ratios[1] <= MAX_PLAIN_RATIO and several < 1.0
    return KernelChoice(
        ours=is_faster,
        matrix_from=matrix_from if is_faster else 0,
        why="ours is faster" if is_faster else "stock is faster",
        ratios=ratios,
    )


def _seconds(
    operation: Operation, layers: Sequence[Any], kernel: Kernel | None, timer: Timer
) -> float:
    """Time a kernel, or stock MLX for None, over the inputs of several layers."""
    if kernel is None:
        return timer(lambda: [operation.stock(inputs) for inputs in layers])
    return timer(lambda: [operation.ours(inputs, kernel) for inputs in layers])
