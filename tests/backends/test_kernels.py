"""The Metal kernels, run on a CPU from the very text that MLX would compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.matmul import (
    GatedTerm,
    Launch,
    PackedWeight,
    Variant,
    gated_lora_down_launch,
    skinny_qmm_launch,
)
from tests.helpers.kernel_host import (
    EPS,
    exact_product,
    float64,
    random_rows,
    random_weight,
    relative_error,
    run_launch,
    unseen_mutants,
)
from tests.metal_host.gate import check
from tests.metal_host.mutants import switchable_barriers
from tests.metal_host.our_kernels import text_of
from tests.metal_host.toolchain import find_clang

VARIANTS: tuple[Variant, ...] = ("scalar", "matrix")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SOAK = pytest.mark.soak


def formats() -> Iterator[Any]:
    """Variant, bits, group size: all of them, of which the default run takes a third.

    There every number of bits meets both variants, and every group size nearly all of the bits.
    """
    for i, bits in enumerate(kernels.BITS):
        for j, variant in enumerate(VARIANTS):
            for k, size in enumerate(kernels.GROUP_SIZES):
                marks = () if k == (i + j) % 3 else SOAK
                yield pytest.param(variant, bits, size, marks=marks)


def product(
    x: mx.array, packed: PackedWeight, variant: Variant = "scalar", **options: object
) -> mx.array:
    launch = skinny_qmm_launch(x, packed, variant=variant)
    return run_launch(launch, **options)[0]  # type: ignore[arg-type]


def same_bits(a: mx.array, b: mx.array) -> bool:
    kind = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    return bool(mx.array_equal(a.view(kind), b.view(kind)))


class TestQuantisedMatmul:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_right_for_rows_and_outputs_that_fill_no_tile(self, variant):
        packed = random_weight(19, 192)
        x = random_rows(5, 192)
        y = product(x, packed, variant, mode="check")
        assert relative_error(y, exact_product(x, packed)) < EPS[mx.float32]

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_within_a_rounding_in_every_type(self, variant, dtype):
        packed = random_weight(40, 1216, group_size=32, dtype=dtype)
        x = random_rows(6, 1216, dtype=dtype)
        wanted = exact_product(x, packed)
        y = product(x, packed, variant, mode="check")
        assert relative_error(y, wanted) < EPS[dtype]
        if dtype != mx.float32:  # the only error is the rounding of each element
            ulp = EPS[dtype] / 2 * np.abs(wanted) + 1e-5 * np.abs(wanted).max()
            assert np.all(np.abs(float64(y) - wanted) <= ulp)

    @pytest.mark.slow
    @pytest.mark.parametrize(("variant", "bits", "group_size"), formats())
    def test_takes_every_format(self, variant, bits, group_size):
        inputs = 96 if group_size == 32 else 3 * group_size  # the last block may be half a block
        packed = random_weight(20, inputs, bits=bits, group_size=group_size)
        x = random_rows(4, inputs)
        y = product(x, packed, variant, mode="check")
        assert relative_error(y, exact_product(x, packed)) < EPS[mx.float32]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "rows",
        [1, 3, 8, 9, 17, 33]
        + [pytest.param(rows, marks=SOAK) for rows in (2, 4, 5, 6, 7, 16, 24, 25, 32)],
    )
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_takes_any_number_of_rows(self, variant, rows):
        packed = random_weight(37, 160, group_size=32)
        x = random_rows(rows, 160)
        y = product(x, packed, variant, mode="check")
        assert relative_error(y, exact_product(x, packed)) < EPS[mx.float32]

    @pytest.mark.slow
    @pytest.mark.parametrize(("outputs", "inputs"), [(8, 32), (1, 512), (33, 64), (65, 2080)])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_takes_any_shape(self, variant, outputs, inputs):
        packed = random_weight(outputs, inputs, group_size=32)
        x = random_rows(4, inputs)
        y = product(x, packed, variant, mode="check")
        assert relative_error(y, exact_product(x, packed)) < EPS[mx.float32]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "counts", [(2, 3, 5, 8, 9, 32), pytest.param(range(1, 33), marks=SOAK)]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gives_a_row_the_same_bits_for_every_number_of_rows(self, dtype, counts):
        packed = random_weight(40, 1216, group_size=32, dtype=dtype)
        x = random_rows(32, 1216, dtype=dtype)
        alone = mx.concatenate([product(x[row : row + 1], packed) for row in range(32)])
        for rows in counts:
            for variant in VARIANTS:
                y = product(x[:rows], packed, variant)
                assert same_bits(y, alone[:rows]), (rows, variant)

    def test_of_other_rows_does_not_reach_a_row(self):
        packed = random_weight(16, 128)
        x = random_rows(3, 128)
        broken = mx.concatenate([x[:2], mx.full((1, 128), float("nan"))])
        for variant in VARIANTS:
            y, z = product(x, packed, variant), product(broken, packed, variant)
            assert same_bits(y[:2], z[:2]) and not same_bits(y, z)

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("simdgroups", [8, 16])
    def test_is_the_same_in_any_order_of_threads(self, variant, simdgroups):
        packed = random_weight(40, 320, group_size=32)
        x = random_rows(5, 320)
        launch = skinny_qmm_launch(x, packed, variant=variant, simdgroups=simdgroups)
        y, _ = run_launch(launch, mode="check")
        for seed in (1, 2, 3):
            z, report = run_launch(launch, mode="check", seed=seed, preempt=seed == 3)
            assert same_bits(y, z) and not report.errors and not report.warnings


class TestGatedLora:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_adds_to_the_rows_behind_the_split_alone(self, variant):
        packed, x, term, wanted = gated_problem(mx.float32)
        y, _ = run_launch(skinny_qmm_launch(x, packed, variant=variant, gated=term), mode="check")
        assert relative_error(y, wanted) < EPS[mx.float32]
        assert same_bits(y[: term.gate_split], product(x, packed, variant)[: term.gate_split])

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rounds_once(self, dtype):
        packed, x, term, wanted = gated_problem(dtype)
        y, _ = run_launch(skinny_qmm_launch(x, packed, gated=term), mode="check")
        assert relative_error(y, wanted) < EPS[dtype]

    @pytest.mark.slow
    @pytest.mark.parametrize(("rows", "split", "ranks"), [(9, 1, 16), (5, 4, 24), (33, 8, 104)])
    def test_forms_the_low_rank_rows(self, rows, split, ranks):
        x, lora_a = random_rows(rows, 320), random_rows(ranks, 320, seed=5)
        launch = gated_lora_down_launch(x, lora_a, gate_split=split)
        y, _ = run_launch(launch, mode="check", seed=1)
        assert relative_error(y, float64(x)[split:] @ float64(lora_a).T) < EPS[mx.float32]
        assert mx.allclose(
            y, kernels.gated_lora_down_ops(x, lora_a, gate_split=split), rtol=0, atol=1e-4
        )


def gated_problem(dtype: mx.Dtype) -> tuple[PackedWeight, mx.array, GatedTerm, np.ndarray]:
    """A weight, rows, what is added, and the result in float64."""
    packed = random_weight(40, 256, dtype=dtype)
    x = random_rows(6, 256, dtype=dtype)
    lora_a = (random_rows(16, 256, seed=5) / 16).astype(dtype)
    lora_b = random_rows(8, 40, dtype=dtype, seed=6)
    low_rank, _ = run_launch(gated_lora_down_launch(x, lora_a, gate_split=2))
    term = GatedTerm(low_rank=low_rank, first_rank=8, lora_b=lora_b, scale=2.0, gate_split=2)
    wanted = exact_product(x, packed)
    wanted[2:] += 2.0 * (float64(x)[2:] @ float64(lora_a)[8:].T) @ float64(lora_b)
    return packed, x, term, wanted


def launches() -> list[Launch]:
    """Launches that between them pass each barrier with something at stake."""
    wide, narrow = random_weight(40, 2112), random_weight(9, 1152, bits=8)
    return [
        skinny_qmm_launch(random_rows(3, 2112), wide),
        skinny_qmm_launch(random_rows(1, 1152), narrow),
        skinny_qmm_launch(random_rows(9, 2112), wide, variant="matrix"),
        skinny_qmm_launch(random_rows(17, 1152), narrow, variant="matrix", simdgroups=8),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_each_barrier_is_missed(number):
    launch = launches()[number]
    text = text_of(launch)
    used = _barriers_of(text.source, "matrix" if number > 1 else "scalar")
    assert not unseen_mutants(
        launch, start=0, text=text, skip=lambda barrier, how: barrier not in used
    )


def _barriers_of(source: str, variant: Variant) -> set[int]:
    """Numbers of the barriers in the text of a variant, counted over the whole text."""
    first, num_barriers = {"scalar": ("store_scalar_sums", 4), "matrix": ("store_matrix_tile", 2)}[
        variant
    ]
    _, before = switchable_barriers(source[: source.index(f"METAL_FUNC void {first}(")])
    end = source.index("\n}\n", source.index(f"METAL_FUNC void skinny_qmm_{variant}("))
    _, within = switchable_barriers(source[:end])
    assert len(within) - len(before) == num_barriers
    return set(range(len(before), len(within)))


class TestTraffic:
    """Bytes that a launch loads from device memory."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("variant", "rows", "times"),
        [("scalar", 1, 1), ("scalar", 5, 1), ("scalar", 8, 1), ("scalar", 16, 2),
         ("matrix", 8, 1), ("matrix", 16, 1), ("matrix", 32, 1)],
    )  # fmt: skip
    def test_weights_are_read_once_for_up_to_eight_rows(self, variant, rows, times):
        packed = random_weight(64, 1024)
        launch = skinny_qmm_launch(random_rows(rows, 1024), packed, variant=variant)
        _, report = run_launch(launch, mode="count")
        assert report.counts is not None
        names = list(launch.inputs)
        loaded = report.counts.buffers[names.index("weight")].loaded
        assert loaded == times * packed.weight.nbytes


@pytest.mark.slow
@pytest.mark.skipif(not find_clang(), reason="the gate needs clang 15 or newer")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_text_is_metal(dtype):
    """As far as can be known without Metal's compiler."""
    packed, x, term, _ = gated_problem(dtype)
    odd = random_weight(40, 96, bits=3, group_size=32, dtype=dtype)
    for launch in (
        skinny_qmm_launch(x, packed),
        skinny_qmm_launch(x, packed, gated=term),
        skinny_qmm_launch(x, packed, variant="matrix", gated=term, simdgroups=8),
        skinny_qmm_launch(random_rows(20, 96, dtype=dtype), odd, variant="matrix"),
        skinny_qmm_launch(random_rows(2, 96, dtype=dtype), odd),
        gated_lora_down_launch(x, random_rows(8, 256, dtype=dtype), gate_split=2),
    ):
        text = text_of(launch)
        assert check(text.source, include=text.include) == []


def test_what_no_kernel_takes_is_said():
    assert random_weight(8, 64).is_supported
    assert not random_weight(4, 64).is_supported  # MLX passes so few scales another way
    odd = PackedWeight(
        weight=mx.zeros((8, 8), dtype=mx.uint32),
        scales=mx.zeros((8, 4)),
        biases=mx.zeros((8, 4)),
        group_size=16,
        bits=4,
    )
    assert not odd.is_supported
