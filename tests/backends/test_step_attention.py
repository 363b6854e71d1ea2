"""The kernels of step attention, run on a CPU from the very text that MLX would compile."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.metal.attention import (
    HEAD_DIMS,
    attention_plan,
    merge_launch,
    step_attention_launch,
    step_attention_ops,
    takes,
)
from tests.helpers.attention_host import Attention, attention, is_right, step_mask
from tests.helpers.kernel_host import run_launch, unseen_mutants
from tests.metal_host.gate import check
from tests.metal_host.mutants import switchable_barriers
from tests.metal_host.our_kernels import text_of
from tests.metal_host.toolchain import find_clang

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SOAK = pytest.mark.soak


def same_bits(a: mx.array, b: mx.array) -> bool:
    kind = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    return bool(mx.array_equal(mx.contiguous(a).view(kind), mx.contiguous(b).view(kind)))


def clean(reports: list) -> bool:
    return not any(report.errors or report.warnings for report in reports)


class TestResult:
    @pytest.mark.slow
    @pytest.mark.parametrize("mask", ["causal", "step", None])
    def test_is_right_within_the_slice_of_a_cache(self, mask):
        """Nobody reads what lies behind the slice: there are no numbers."""
        given = step_mask(5, 140) if mask == "step" else mask
        problem = attention(5, 140, heads=6, kv_heads=2, mask=given)
        y, reports = problem.run(mode="check")
        assert is_right(y, problem.exact()) and clean(reports)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("head_dim", "dtype"),  # the default run takes every second pair
        [
            pytest.param(head_dim, dtype, marks=SOAK if (i + j) % 2 else ())
            for i, head_dim in enumerate(HEAD_DIMS)
            for j, dtype in enumerate(DTYPES)
        ],
    )
    def test_is_within_a_rounding_for_every_head_in_every_type(self, head_dim, dtype):
        for rows, count in ((1, 33), (3, 135)):
            problem = attention(rows, count, head_dim=head_dim, heads=2, dtype=dtype, mask="causal")
            y, _ = problem.run()
            assert is_right(y, problem.exact()), (rows, count)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "counts", [(1, 3, 11), pytest.param((1, 2, 3, 5, 8, 11, 17, 32), marks=SOAK)]
    )
    @pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (4, 1), (8, 1)])
    def test_is_right_for_every_number_of_rows(self, heads, kv_heads, counts):
        for rows in counts:
            mask = step_mask(rows, 130, quadratic=rows % 3 == 2 and rows > 2)
            problem = attention(rows, 130, heads=heads, kv_heads=kv_heads, mask=mask, seed=rows)
            y, _ = problem.run()
            assert is_right(y, problem.exact()), rows

    @pytest.mark.slow
    def test_is_right_for_every_number_of_keys_around_a_border(self):
        for count in (1, 2, 31, 32, 33, 65, 127, 128, 129, 256, 257, 700):
            problem = attention(1, count, heads=1)
            assert is_right(problem.run()[0], problem.exact()), count

    @pytest.mark.slow
    def test_of_large_scores_is_right(self):
        problem = attention(3, 300, mask="causal")
        large = Attention(problem.queries * 100, problem.keys, problem.values, "causal")
        y, wanted = large.run()[0], large.exact()
        assert np.abs(np.array(y) - wanted).max() < 1e-3 * np.abs(wanted).max()

    @pytest.mark.slow
    def test_of_a_row_that_sees_nothing_is_zero(self):
        """Nor do spans that nobody sees leave anything behind."""
        sees = np.zeros((3, 300), dtype=bool)
        sees[0, 260:] = sees[2, 3] = True  # the middle span is hidden from all
        problem = attention(3, 300, mask=mx.array(sees))
        y, reports = problem.run(mode="check")
        assert is_right(y, problem.exact()) and clean(reports)
        assert not np.array(y[:, :, 1]).any()

    @pytest.mark.slow
    def test_takes_a_mask_of_a_few_elements(self):
        mask = mx.array([[True, False, False], [True, True, False]])
        problem = attention(2, 3, mask=mask)
        assert is_right(problem.run()[0], problem.exact())

    @pytest.mark.slow
    def test_agrees_with_stock_mlx(self):
        problem = attention(4, 50, mask="causal")
        stock = step_attention_ops(
            problem.queries, problem.keys, problem.values, scale=problem.scale, mask="causal"
        )
        assert mx.allclose(problem.run()[0], stock, rtol=0, atol=1e-5)


class TestBits:
    """Of a row depend on nothing but its query and the keys that it sees."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "counts", [(1, 2, 5, 8, 17, 32), pytest.param(range(1, 33), marks=SOAK)]
    )
    @pytest.mark.parametrize("heads", [1, 3])
    def test_are_the_same_for_every_number_of_rows(self, heads, counts):
        context = 114  # the rows' own keys lie on both sides of a border between spans
        problem = attention(32, context + 32, heads=heads)
        alone = mx.concatenate(
            [problem.rows(row, row + 1, keys=context + row + 1).run()[0] for row in range(32)],
            axis=2,
        )
        for rows in counts:
            y, _ = problem.rows(0, rows, keys=context + rows, mask="causal").run()
            assert same_bits(y, alone[:, :, :rows]), rows

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("rows", "dtype"),
        [(6, dtype) for dtype in DTYPES]
        + [(1, mx.float32), (17, mx.float32)]
        + [pytest.param(rows, mx.float32, marks=SOAK) for rows in (11, 32)],
    )
    def test_are_the_same_with_masked_keys_behind_and_every_kind_of_mask(self, rows, dtype):
        seen = 125 + rows
        problem = attention(rows, 260, dtype=dtype)
        causal, _ = problem.rows(0, rows, keys=seen, mask="causal").run()
        for count in (seen, seen + 9, 260):
            mask = mx.array(np.tri(rows, count, 125, dtype=bool))
            y, _ = problem.rows(0, rows, keys=count, mask=mask).run()
            assert same_bits(y, causal), count

    @pytest.mark.slow
    @pytest.mark.parametrize(("rows", "count"), [(1, 150), (3, 150), (6, 300)])
    def test_are_the_same_in_any_order_of_threads(self, rows, count):
        """3, 9 and 18 query heads: four, two and one group of keys."""
        problem = attention(rows, count, mask=step_mask(rows, count) if rows > 1 else None)
        y, reports = problem.run(mode="check")
        assert clean(reports)
        for seed in (1, 2, 3):
            z, reports = problem.run(mode="check", seed=seed, preempt=seed == 3)
            assert same_bits(y, z) and clean(reports), seed

    @pytest.mark.slow
    def test_do_not_depend_on_the_order_within_a_simdgroup(self):
        problem = attention(2, 150, mask="causal")
        assert same_bits(problem.run()[0], problem.run(sum_order="descending")[0])


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "groups"), [(1, (1, 4)), (3, (3, 2)), (6, (5, 1))])
def test_each_barrier_is_missed(rows, groups):
    plan = attention_plan(3 * rows, head_dim=64, dtype=mx.float32)
    assert (plan.head_groups, plan.key_groups) == groups
    mask = np.tri(rows, 261, 255, dtype=bool)
    mask[:, :128] = False
    problem = attention(rows, 261, mask=mx.array(mask))
    launch = step_attention_launch(
        problem.queries, problem.keys, problem.values, scale=0.125, mask=problem.mask
    )
    text = text_of(launch)
    start = text.source.index("METAL_FUNC void fetch_chunk(")
    assert len(switchable_barriers(text.source, start=start)[1]) == 8

    def is_idle(barrier: int, how: str) -> bool:
        if plan.key_groups == 1 and barrier in (0, 1, 2):  # between groups of keys
            return True
        # With one head group keys stay in a simdgroup; two of these order the queries.
        return plan.head_groups == 1 and how == "simdgroup" and barrier in (3, 4, 5, 6)

    assert not unseen_mutants(launch, start=start, text=text, skip=is_idle)


class TestTraffic:
    """Bytes that a launch loads from device memory."""

    @pytest.mark.slow
    @pytest.mark.skipif(not find_clang(), reason="counting needs clang 15 or newer")
    @pytest.mark.parametrize(
        ("rows", "times"), [(1, 1), (4, 1), (8, 1), (10, 1), (11, 2), (21, 2), (22, 3)]
    )
    def test_keys_are_read_once_for_up_to_32_query_heads(self, rows, times):
        problem = attention(rows, 128, dtype=mx.float16, mask="causal")
        launch = step_attention_launch(
            problem.queries, problem.keys, problem.values, scale=0.125, mask="causal"
        )
        _, report = run_launch(launch, mode="count")
        assert report.counts is not None
        text = text_of(launch)
        place = 0
        for name, extra in zip(launch.inputs, text.metadata, strict=True):
            if name in ("keys", "values"):
                assert report.counts.buffers[place].loaded == times * problem.keys.nbytes, name
            place += 1 + sum(extra)

    @pytest.mark.slow
    @pytest.mark.skipif(not find_clang(), reason="counting needs clang 15 or newer")
    def test_spans_that_nobody_sees_are_not_read(self):
        mask = np.zeros((1, 640), dtype=bool)
        mask[:, 600:] = True
        problem = attention(1, 640, dtype=mx.float16, mask=mx.array(mask))
        launch = step_attention_launch(
            problem.queries, problem.keys, problem.values, scale=0.125, mask=problem.mask
        )
        _, report = run_launch(launch, mode="count")
        assert report.counts is not None
        assert problem.keys.nbytes // 5 in {each.loaded for each in report.counts.buffers.values()}


@pytest.mark.slow
@pytest.mark.skipif(not find_clang(), reason="the gate needs clang 15 or newer")
@pytest.mark.parametrize(
    ("rows", "dtype", "mask"),
    [(1, mx.float32, None), (3, mx.float16, "causal"), (8, mx.bfloat16, "step")],
)
def test_the_text_is_metal(rows, dtype, mask):
    """As far as can be known without Metal's compiler."""
    given = step_mask(rows, 40) if mask == "step" else mask
    problem = attention(rows, 40, head_dim=80, dtype=dtype, mask=given)
    launch = step_attention_launch(
        problem.queries, problem.keys, problem.values, scale=0.1, mask=given
    )
    partial = mx.zeros(launch.output_shape)
    for each in (launch, merge_launch(partial, heads=3, dtype=dtype)):
        text = text_of(each)
        assert check(text.source, include=text.include) == []


class TestWhatIsTaken:
    def test_plans_fit_a_threadgroup(self):
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                for count in range(1, 257):
                    plan = attention_plan(count, head_dim=head_dim, dtype=dtype)
                    heads = plan.each * plan.head_groups
                    assert plan.tiles * heads >= count and plan.threads <= 256
                    assert head_dim % plan.chunk == 0
                    quads = plan.chunk * dtype.size // 16 | 1
                    staged = plan.key_groups * 32 * 16 * quads
                    exchanged = 4 * plan.key_groups * plan.head_groups * (head_dim + 1)
                    assert plan.key_groups == 1 or exchanged <= staged
                    assert staged + 4 * heads * (head_dim + 33 * plan.key_groups) <= 32 << 10

    def test_up_to_32_rows_of_one_batch_and_type(self):
        problem = attention(4, 40)
        arrays = (problem.queries, problem.keys, problem.values)
        assert takes(*arrays) and takes(*arrays, "causal") and takes(*arrays, step_mask(4, 40))
        many = attention(33, 40)
        assert not takes(many.queries, many.keys, many.values)
        assert not takes(problem.queries.astype(mx.float16), *arrays[1:])
        assert not takes(*(mx.concatenate([each, each]) for each in arrays))
        assert not takes(*(each[..., :32] for each in arrays))

    def test_masks_that_are_added_are_not(self):
        problem = attention(4, 40)
        arrays = (problem.queries, problem.keys, problem.values)
        assert not takes(*arrays, mx.zeros((4, 40)))
        assert not takes(*arrays, mx.ones((3, 4, 40), dtype=mx.bool_))
        assert not takes(*arrays, mx.ones((4, 39), dtype=mx.bool_))
        assert takes(*arrays, mx.ones((1, 1, 4, 40), dtype=mx.bool_))

    def test_chunks_leave_few_lanes_idle(self):
        chunks = {
            dims: attention_plan(1, head_dim=dims, dtype=mx.float16).chunk for dims in HEAD_DIMS
        }
        assert chunks == {64: 64, 80: 40, 96: 32, 128: 64, 256: 64}
