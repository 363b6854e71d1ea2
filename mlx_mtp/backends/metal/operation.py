"""An operation to check and benchmark a kernel by: ours, stock MLX, a reference and inputs.

``check`` compares our kernels with the reference on the device at hand.  It also requires that a
row has the same bits whatever the number of rows computed with it, and in every variant: plain
decoding (one row) and verification (several) then give the same ids.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from mlx_mtp.backends.metal.matmul import MATRIX_MIN_ROWS, Variant

FLOAT32_BOUND = 1e-5  # of the largest value
HALF_ULP = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 0.0}
TIMED_ROUNDS = 5


class CheckError(Exception):
    """A kernel gives a wrong result."""


@dataclass(frozen=True)
class Kernel:
    """One way to launch our kernel.

    Attributes:
        variant: ``matrix`` uses the GPU's matrix units.
        simdgroups: of a threadgroup of the matrix variant.
    """

    variant: Variant = "scalar"
    simdgroups: int = 16

    @property
    def min_rows(self) -> int:
        """Fewest rows that it is used for."""
        return MATRIX_MIN_ROWS if self.variant == "matrix" else 1


class Operation(ABC):
    """One computation at one shape.

    Inputs are tuples of one layer's operands; their type is the operation's own matter.

    Attributes:
        name: identifies operation and shape, in reports and in the cache.
        kernels: ours; the first one is always needed, the others must have its bits.  Of one
            variant, the first that passes the check is used.
        row_axis: axis of the rows in a result.
        check_rows: numbers of rows to check.
        benchmark_rows: numbers of rows to time; 1, for plain decoding, is among them.
        decisive_rows: numbers of rows over which ours must be faster on average.
        contexts: lengths of context to time.
    """

    name: str
    kernels: ClassVar[Sequence[Kernel]] = (Kernel(),)
    row_axis: ClassVar[int]
    check_rows: Sequence[int]
    benchmark_rows: ClassVar[Sequence[int]]
    decisive_rows: ClassVar[Sequence[int]]
    contexts: Sequence[int] = (0,)

    @property
    def is_supported(self) -> bool:
        """Whether there is a kernel for the shape."""
        return True

    @abstractmethod
    def ours(self, inputs: Any, kernel: Kernel) -> mx.array:
        """Our kernel's result; RuntimeError, now or when evaluated, where it cannot run."""

    @abstractmethod
    def stock(self, inputs: Any) -> mx.array:
        """MLX's result."""

    @abstractmethod
    def reference(self, inputs: Any) -> mx.array:
        """The result in float32 operations."""

    @abstractmethod
    def check_inputs(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield inputs to compare with the reference, with the words that describe their size."""

    @abstractmethod
    def ordered_rows(self, num_rows: int) -> Callable[[int, int], Any]:
        """Draw rows; return a function that gives the inputs of rows ``first`` to ``last``.

        A row sees no row after it, so its result must not depend on these.
        """

    @abstractmethod
    def benchmark_inputs(self, rows: int, context: int) -> list[Any]:
        """Inputs of several layers; a single one would stay in the GPU's cache."""

    def describe(self, kernel: Kernel) -> str:
        """What a message calls a kernel."""
        return f"the {kernel.variant} variant"

    def with_gated_lora(self) -> Operation | None:
        """The same operation with gated low-rank weights, if there is one."""
        return None

    def check_kernel(self, kernel: Kernel) -> mx.array:
        """Check one kernel.

        Returns:
            The result for the largest number of rows.

        Raises:
            CheckError: a result is wrong.
            RuntimeError: the kernel does not run.
        """
        rows = [count for count in self.check_rows if count >= kernel.min_rows]
        for size, inputs in self.check_inputs(rows):
            if not is_near(self.ours(inputs, kernel), self.reference(inputs)):
                raise CheckError(f"{self.describe(kernel)} is wrong at {size}")
        select = self.ordered_rows(max(rows))
        whole = self.ours(select(0, max(rows)), kernel)
        spans = [(0, count) for count in rows]
        if kernel.min_rows == 1:
            spans += [(row, row + 1) for count in rows for row in {count // 2, count - 1}]
        for first, last in dict.fromkeys(spans):
            y = self.ours(select(first, last), kernel)
            if not same_bits(y, self._rows(whole, first, last)):
                where = f"at {last} rows" if first == 0 else f"for row {first} alone"
                raise CheckError(f"{self.describe(kernel)} gives other bits {where}")
        return whole

    def _rows(self, y: mx.array, first: int, last: int) -> mx.array:
        return y.swapaxes(0, self.row_axis)[first:last].swapaxes(0, self.row_axis)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of a self-check.

    Attributes:
        kernels: those that are right; none if the first one is wrong.
        gated: whether they are right with gated low-rank weights, too.
        problem: the last thing that was wrong.
    """

    kernels: tuple[Kernel, ...] = ()
    gated: bool = False
    problem: str = ""

    @property
    def matrix(self) -> Kernel | None:
        """The matrix variant that is right, if there is one."""
        return next((kernel for kernel in self.kernels if kernel.variant == "matrix"), None)


def check(operation: Operation) -> Check:
    """Check all kernels of an operation on the device at hand."""
    passed: list[Kernel] = []
    results: list[mx.array] = []
    problem = ""
    for kernel in operation.kernels:
        if any(kernel.variant == other.variant for other in passed):
            continue
        y, problem = _try(operation, kernel)
        if y is None and not passed:
            return Check(problem=problem)
        if y is not None and results and not same_bits(y, results[0]):
            problem = f"{operation.describe(kernel)} adds in another order"
        elif y is not None:
            passed.append(kernel)
            results.append(y)
    gated = operation.with_gated_lora()
    if gated is None:
        return Check(kernels=tuple(passed), problem=problem)
    problems = [wrong for kernel in passed if (wrong := _try(gated, kernel)[1])]
    return Check(
        kernels=tuple(passed), gated=not problems, problem=problem or "".join(problems[-1:])
    )


def _try(operation: Operation, kernel: Kernel) -> tuple[mx.array | None, str]:
    """Check a kernel; return its result, or None and the problem."""
    try:
        return operation.check_kernel(kernel), ""
    except CheckError as error:
        return None, str(error)
    except Exception as error:  # threadgroups too large, a compiler that refuses, no Metal
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"{operation.describe(kernel)} does not run: {line}"


Timer = Callable[[Callable[[], list[mx.array]]], float]


def median_seconds(calls: Callable[[], list[mx.array]]) -> float:
    """Time some calls that are evaluated together: the median of a few rounds after a warm-up."""
    times = []
    for _ in range(1 + TIMED_ROUNDS):
        start = time.perf_counter()
        mx.eval(calls())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def is_near(y: mx.array, reference: mx.array) -> bool:
    """Whether a result differs from a float32 reference by no more than rounding."""
    largest = mx.abs(reference).max()
    bound = FLOAT32_BOUND * largest + HALF_ULP[y.dtype] * mx.abs(reference)
    # The operations of the reference may round as much again.
    return bool(mx.all(mx.abs(y.astype(mx.float32) - reference) <= 2 * bound).item())


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Whether two floating-point results are the same bit by bit."""
    kind = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    return bool(mx.array_equal(a.view(kind), b.view(kind)).item())
