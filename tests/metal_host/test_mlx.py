"""MLX's own kernels, from the headers of its wheel: Metal that nobody here wrote.

They run right against float64, check mode says nothing about them, and each barrier of `qmm_t`,
removed or weakened, is missed by somebody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.metal_host import Kernel
from tests.metal_host.compiler import preprocess
from tests.metal_host.mlx_headers import attention_source, include_folder
from tests.metal_host.mlx_kernels import KERNELS, qmm_t
from tests.metal_host.mutants import mutant, mutants, original, switchable_barriers
from tests.metal_host.quantised import Shape, make_problem

# A result within one rounding of the type, and what sums of floats in another order may differ by.
LIMITS = {"float32": 1e-6, "float16": 2**-11 + 1e-5, "bfloat16": 2**-8 + 1e-5}
CASES = [
    ("qmv", Shape(1, 64, 512, 4, 64, "float16")),
    ("qmv", Shape(2, 64, 1024, 4, 64, "float32")),
    ("qmv", Shape(1, 64, 512, 4, 64, "bfloat16")),
    ("qmv", Shape(1, 67, 320, 4, 64, "float16")),
    ("qmv", Shape(1, 64, 480, 8, 32, "float32")),
    ("qmv", Shape(1, 32, 512, 3, 64, "float16")),
    ("qmv", Shape(1, 32, 512, 6, 64, "bfloat16")),
    ("qmv_quad", Shape(1, 256, 64, 4, 64, "float16")),
    ("qmv_wide", Shape(7, 70, 512, 4, 64, "float32")),
    ("qmm_t", Shape(33, 64, 128, 4, 64, "float16")),
    ("qmm_t", Shape(32, 64, 128, 4, 64, "float32")),
    ("qmm_t", Shape(40, 72, 128, 4, 64, "bfloat16")),
    ("qmm_n", Shape(33, 64, 128, 4, 64, "float16", transpose=False)),
    ("qvm", Shape(1, 128, 256, 4, 64, "float16", transpose=False)),
]


def one_case_per_kernel() -> Iterator[Any]:
    """All cases; the default run takes the first of each kernel."""
    for number, case in enumerate(CASES):
        is_first = case[0] not in {kernel for kernel, _ in CASES[:number]}
        yield pytest.param(*case, marks=() if is_first else pytest.mark.soak)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize(("kernel", "shape"), one_case_per_kernel(), ids=str)
def test_quantised_kernels_are_right(kernel, shape, mode):
    problem = make_problem(shape)
    y, report = KERNELS[kernel](problem).run(mode=mode, seed=1 if mode == "check" else 0)
    # MLX stages dequantised weights in the type for qmm: those differ by a rounding each.
    slack = 4 if kernel.startswith("qmm") else 1
    assert problem.error(y) < slack * LIMITS[shape.dtype]
    assert not report.errors
    # qmv's last threadgroup starts early enough to be whole: rows that two of them write alike.
    overlaps = mode == "check" and kernel == "qmv" and shape.n % 8 != 0
    assert [text[:10] for text in report.warnings] == ["SAME-VALUE"] * overlaps


def attention_error(*, heads: int, kv_heads: int, length: int, size: int, dtype, mode: str):
    """How far sdpa_vector is from float64, relative; one query row."""
    rng, name = np.random.default_rng(0), {np.float16: "half", np.float32: "float"}[dtype]
    q = rng.standard_normal((heads, 1, size)).astype(dtype)
    k, v = (rng.standard_normal((kv_heads, length, size)).astype(dtype) for _ in range(2))
    out = np.zeros((heads, 1, size), dtype)
    strides = {6: length * size, 7: size, 8: length * size, 9: size}
    buffers = {0: q, 1: k, 2: v, 3: out, 4: np.int32(heads // kv_heads), 5: np.int32(length)}
    buffers |= {index: np.uint64(stride) for index, stride in strides.items()}
    buffers |= {10: np.float32(size**-0.5), 17: np.int32(heads)}
    buffers |= {index: np.int32(0) for index in (13, 14, 15)}
    constants = {index: np.bool_(False) for index in (20, 21, 22, 23, 24, 25)} | {26: np.int32(1)}
    kernel = Kernel(
        attention_source(),
        "sdpa_vector",
        f"<{name}, {size}, {size}>",
        include=[include_folder()],
        mode=mode,
    )
    kernel((heads * 1024, 1, 1), (1024, 1, 1), buffers, constants=constants, uninit=(3,))
    q64, k64, v64 = (array.astype(np.float64) for array in (q, k, v))
    k64, v64 = (np.repeat(array, heads // kv_heads, axis=0) for array in (k64, v64))
    scores = np.exp(q64 @ k64.transpose(0, 2, 1) * size**-0.5)
    expected = scores @ v64 / scores.sum(-1, keepdims=True)
    return np.abs(out - expected).max() / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "check"])
def test_attention_is_right(mode):
    sizes = {"heads": 8, "kv_heads": 2, "length": 200, "size": 64}
    assert attention_error(**sizes, dtype=np.float16, mode=mode) < 1e-3
    assert attention_error(**sizes, dtype=np.float32, mode=mode) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_each_barrier_of_qmm_t_is_missed(every):
    """Comparing outputs sees about half of these; the shadow memory sees all 24.  Nobody misses the
    ninth barrier: what is stored after it lies in registers."""
    shapes = [Shape(33, 64, 128), Shape(40, 72, 128), Shape(64, 64, 128), Shape(32, 72, 128)]
    text, scopes = _switchable_qmm_t(shapes[0])
    assert len(scopes) == 9
    for how, constants, expected in [*_mutations(scopes)][::every]:
        reports = [_check(text, shape, constants) for shape in shapes]
        errors = [error for report in reports for error in report.errors]
        assert any(error.startswith("RACE") for error in errors) == expected, how
        assert expected or not errors


def _mutations(scopes: list[str]):
    yield "as it is", original(), False
    for barrier, how in mutants(scopes):
        yield f"barrier {barrier} {how}", mutant(barrier, how), barrier != len(scopes) - 1


def _switchable_qmm_t(shape: Shape) -> tuple[str, list[str]]:
    launch = qmm_t(make_problem(shape))
    text = preprocess(launch.source, include=launch.include)
    start = (
        text.index("METAL_FUNC void qmm_t_impl(") if "METAL_FUNC void qmm_t_impl(" in text else 0
    )
    start = start or text.index("void qmm_t_impl(")
    return switchable_barriers(text, start=start, end=text.index("\n}\n", start))


def _check(text: str, shape: Shape, constants):
    launch = qmm_t(make_problem(shape))
    kernel = Kernel(text, launch.name, launch.template_args, mode="check")
    return kernel(
        launch.grid,
        launch.threadgroup,
        launch.buffers,
        constants=constants,
        uninit=(launch.output,),
        raise_on_error=False,
    )
