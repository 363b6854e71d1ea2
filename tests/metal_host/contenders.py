"""The quantised matmuls that `python -m tests.metal_host.count` compares.

To add one: append a `Contender` to CONTENDERS.  `build` takes a Problem (arrays, shape, float64
answer) and returns the launches that solve it, in order; most need one.  A launch names the roles
of its buffers (weight, scales, biases, x, y), by which traffic is added up; arrays that only pass
from one launch to the next have other names, and count as `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import our_kernels
from .mlx_kernels import qmm_t, qmv, qmv_wide
from .quantised import Launch, Problem, Shape


def _any_shape(shape: Shape) -> bool:
    return True


@dataclass(frozen=True)
class Contender:
    label: str
    build: Callable[[Problem], Sequence[Launch]]
    takes: Callable[[Shape], bool] = _any_shape


CONTENDERS: list[Contender] = [
    Contender("mlx qmv", lambda problem: [qmv(problem)]),
    Contender("mlx qmv_wide", lambda problem: [qmv_wide(problem)], lambda shape: shape.m > 1),
    Contender("mlx qmm", lambda problem: [qmm_t(problem)]),
    Contender("our scalar", lambda problem: [our_kernels.scalar(problem)]),
    Contender("our matrix", lambda problem: [our_kernels.matrix(problem)]),
]
