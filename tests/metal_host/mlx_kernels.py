"""MLX's own quantised kernels, launched as MLX's dispatch does (0.32)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .mlx_headers import include_folder, quantized_source
from .quantised import Launch, Problem

ROLES = {0: "weight", 1: "scales", 2: "biases", 3: "x", 4: "y"}


def _launch(
    problem: Problem,
    kernel: str,
    args: list,
    groups: tuple[int, int],
    threadgroup: tuple[int, int, int],
    sizes: list[int],
) -> Launch:
    """sizes: the integers from buffer 5 on; the numbers of batch dimensions, 0, follow them."""
    shape = problem.shape
    words = [shape.metal_type, shape.group_size, shape.bits, *args]
    arrays = [problem.weight, problem.scales, problem.biases, problem.x, problem.output()]
    numbers = dict(enumerate((np.int32(size) for size in sizes), 5))
    batch = 5 + len(sizes)
    return Launch(
        source=quantized_source(),
        name=kernel,
        template_args=f"<{', '.join(str(word).lower() for word in words)}>",
        grid=(groups[0] * threadgroup[0], groups[1] * threadgroup[1], threadgroup[2]),
        threadgroup=threadgroup,
        buffers={**dict(enumerate(arrays)), **numbers, batch: np.int32(0), batch + 3: np.int32(0)},
        output=4,
        roles=ROLES,
        include=(include_folder(),),
    )


def _up(a: int, b: int) -> int:
    return (a + b - 1) // b


def qmv(problem: Problem) -> Launch:
    """One grid row for each row of x: two simdgroups, four outputs each."""
    s = problem.shape
    fast = s.n % 8 == 0 and s.k % 512 == 0
    name = "affine_qmv_fast" if fast else "affine_qmv"
    return _launch(problem, name, [False], (s.m, _up(s.n, 8)), (32, 2, 1), [s.k, s.n])


def qmv_quad(problem: Problem) -> Launch:
    """K of 64 or 128."""
    s = problem.shape
    return _launch(
        problem, "affine_qmv_quad", [s.k, False], (s.m, _up(s.n, 64)), (32, 1, 1), [s.k, s.n]
    )


def qmv_wide(problem: Problem) -> Launch:
    """Eight lanes share a row of W; tiles of at most five rows of x."""
    s = problem.shape
    tiles = _up(s.m, 5)
    rows = _up(s.m, tiles)
    return _launch(
        problem,
        "affine_qmv_wide",
        [rows, 8, False],
        (_up(s.m, rows), _up(s.n, 8)),
        (32, 2, 1),
        [s.k, s.n, s.m],
    )


def qvm(problem: Problem) -> Launch:
    s = problem.shape
    return _launch(problem, "affine_qvm", [False], (s.m, _up(s.n, 64)), (32, 2, 1), [s.k, s.n])


def qmm_t(problem: Problem) -> Launch:
    """Tiles of 32 by 32."""
    s = problem.shape
    groups = (_up(s.n, 32), _up(s.m, 32))
    aligned = s.n % 32 == 0
    return _launch(problem, "affine_qmm_t", [aligned, False], groups, (32, 2, 2), [s.k, s.n, s.m])


def qmm_n(problem: Problem) -> Launch:
    """W not transposed."""
    s = problem.shape
    groups = (_up(s.n, 32), _up(s.m, 32))
    return _launch(problem, "affine_qmm_n", [False], groups, (32, 2, 2), [s.k, s.n, s.m])


KERNELS: dict[str, Callable[[Problem], Launch]] = {
    function.__name__: function for function in (qmv, qmv_quad, qmv_wide, qvm, qmm_t, qmm_n)
}
