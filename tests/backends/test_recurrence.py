"""The kernels of recurrent layers, run on a CPU from the very text that MLX would compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.metal import gated_delta, ssm
from mlx_mtp.backends.metal.gated_delta import gated_delta_step_ops
from mlx_mtp.backends.metal.operation import same_bits
from mlx_mtp.backends.metal.recurrence import StepRuns
from mlx_mtp.backends.metal.ssm import ssm_step_ops
from mlx_mtp.model.layout import StepLayout
from tests.helpers.kernel_host import float64, launch_text_all, run_launch_all
from tests.helpers.recurrence_host import LAYOUTS, Ssm, delta, mamba
from tests.metal_host import Kernel
from tests.metal_host.gate import check
from tests.metal_host.our_kernels import text_of
from tests.metal_host.toolchain import find_clang

ULP = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
KINDS: dict[str, Callable[..., Any]] = {
    "packed": delta,
    "unpacked": lambda *args, **options: delta(*args, key_dim=64, **options),
    "gates by key": lambda *args, **options: delta(*args, by_key=True, **options),
    "ssm": mamba,
}
needs_clang = pytest.mark.skipif(not find_clang(), reason="needs clang 15 or newer")
DTYPES = [mx.float32, *(pytest.param(x, marks=pytest.mark.slow) for x in (mx.bfloat16, mx.float16))]


def is_right(y: mx.array, wanted: np.ndarray) -> bool:
    """Within 1e-5 of the largest value and, where the type is shorter, one rounding."""
    assert y.shape == wanted.shape
    bound = 1e-5 * np.abs(wanted).max() + ULP[y.dtype] * np.abs(wanted)
    return bool(np.all(np.abs(float64(y) - wanted) <= bound))


def by_stock(problem: Any) -> tuple[mx.array, mx.array]:
    """The results and the stored state by mlx-lm's own kernel, one row a call."""
    state, runs, rows = problem.state, problem.runs, problem.rows
    for row in range(runs.num_kept):
        _, state = problem.stock(problem.kept, row, state)
    stored, ordinary, masks = state, [], []
    for row in range(runs.num_ordinary):
        y, state = problem.stock(rows, row, state)
        ordinary.append(y)
        branch = state
        for mask in range(runs.groups[row], runs.groups[row + 1]):
            y, branch = problem.stock(rows, mask, branch)
            masks.append(y)
    return mx.stack(ordinary + masks), stored


@pytest.mark.parametrize(
    "kind",
    [
        *("packed", "ssm"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("unpacked", "gates by key")),
    ],
)
class TestEveryKind:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_right_in_every_layout(self, kind, dtype):
        for layout in LAYOUTS:
            problem = KINDS[kind](layout, dtype=dtype)
            y, state, _ = problem.run()
            exact, exact_state = problem.exact()
            assert is_right(y, exact) and is_right(state, exact_state), layout

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_has_the_bits_of_one_row_at_a_time_by_mlx_lm(self, kind, dtype):
        problem = KINDS[kind]("ragged", dtype=dtype)
        y, state, _ = problem.run()
        wanted, stored = by_stock(problem)
        assert same_bits(y, wanted) and same_bits(state, stored)

    def test_a_kept_row_has_the_bits_that_it_had_as_a_row_of_the_step(self, kind):
        """The next step's first result is the same whether the last step's rows are kept or run."""
        layout = StepLayout(1, 4, (0,) * 5)
        problem = KINDS[kind](layout, num_kept=0)
        whole, _, _ = problem.run()
        for kept in range(1, 5):
            after = replace(
                problem,
                rows=problem.rows.rows(kept, 5),
                kept=problem.rows,
                runs=StepRuns(num_kept=kept, groups=(5 - kept,) * (6 - kept)),
            )
            y, _, _ = after.run()
            assert same_bits(y, whole[kept:]), kept

    def test_without_ordinary_rows_gives_the_state_alone(self, kind):
        problem = KINDS[kind]()
        _, state, _ = problem.run()
        only = replace(
            problem, rows=problem.rows.rows(0, 1), runs=StepRuns(num_kept=2, groups=(0,))
        )
        assert same_bits(only.run()[1], state)

    def test_has_no_races_in_any_order_of_threads(self, kind):
        problem = KINDS[kind]("ragged")
        y, state, _ = problem.run()
        for options in ({}, {"seed": 1}, {"seed": 2, "preempt": True}):
            z, other, report = problem.run(mode="check", **options)
            assert not report.errors and not report.warnings
            assert same_bits(y, z) and same_bits(state, other)

    @needs_clang
    def test_reads_and_writes_the_state_once_whatever_the_layout(self, kind):
        for layout in LAYOUTS:
            problem = KINDS[kind](layout)
            launch = problem.launch()
            _, report = run_launch_all(launch, mode="count")
            assert report.counts is not None
            names = [*launch.inputs, *launch.outputs]
            buffers = dict(zip(names, report.counts.buffers.values(), strict=True))
            size = problem.state.nbytes
            assert buffers["state_in"].loaded == buffers["state_in"].distinct == size, layout
            assert buffers["state_out"].stored == size, layout
            assert buffers["state_out"].loaded == buffers["state_in"].stored == 0, layout

    @needs_clang
    def test_the_text_is_metal(self, kind):
        """As far as can be known without Metal's compiler."""
        text = text_of(KINDS[kind](dtype=mx.bfloat16).launch())
        assert check(text.source, include=text.include) == []

    def test_the_plain_operations_agree(self, kind):
        problem = KINDS[kind]("ragged")
        arguments = (problem.rows, problem.kept, problem.runs, problem.state)
        if isinstance(problem, Ssm):
            y, state = ssm_step_ops(*arguments, problem.weights)
        else:
            y, state = gated_delta_step_ops(*arguments)
        exact, exact_state = problem.exact()
        assert is_right(y, exact) and is_right(state, exact_state)


ASCENDING = "for (int i = c * Shape::chain; i < (c + 1) * Shape::chain; i++)"
DESCENDING = "for (int i = (c + 1) * Shape::chain - 1; i >= c * Shape::chain; i--)"
TREE = """((chains[0] + chains[1]) + (chains[2] + chains[3])) +
      ((chains[4] + chains[5]) + (chains[6] + chains[7]))"""
PLANTED = {  # a kind, a part of its text, and what is put in its place
    "another tree": ("packed", TREE, " + ".join(f"chains[{i}]" for i in range(8))),
    "a descending chain": ("packed", ASCENDING, DESCENDING),
    "a descending chain of unpacked rows": ("gates by key", ASCENDING, DESCENDING),
    "another order of lanes": (
        "unpacked",
        "return simd_sum(chains[0]);",
        """float sum = chains[0];
  for (int apart = 16; apart > 0; apart /= 2) {
    sum += simd_shuffle_xor(sum, apart);
  }
  return sum;""",
    ),
    "a gate that comes late": ("packed", "state[i] = state[i] * gate(row, i);", ""),
    "products in another order": (
        "ssm",
        "input * step * static_cast<float>(inputs[i])",
        "input * (step * static_cast<float>(inputs[i]))",
    ),
    "a kept row too few": ("ssm", "row < order.kept()", "row < order.kept() - 1"),
    "masks that change the state": ("ssm", "rows.update(branch, mask)", "rows.update(state, mask)"),
    "masks from the last ordinary row": (
        "packed",
        "branch[i] = state[i];",
        "branch[i] = state_in[i];",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_of_order_is_seen(name):
    kind, old, new = PLANTED[name]
    problem = KINDS[kind]("ragged")
    y, state, _ = problem.run()
    launch = problem.launch()
    text = text_of(launch)
    assert old in text.source
    source = text.source.replace(old, new)
    kernel = Kernel(source, text.name, text.template_args, include=text.include)
    (z, other), _ = launch_text_all(kernel, text, launch)
    assert not (same_bits(y, z) and same_bits(state, other))


class TestShapes:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"key_dim": 32, "value_dim": 6, "heads": 2},
            {"key_dim": 128, "value_dim": 12, "heads": 3, "key_heads": 3},
            {"key_dim": 256, "value_dim": 8, "heads": 2, "by_key": True},
            {"key_dim": 128, "value_dim": 8, "heads": 1, "key_heads": 1},
        ],
    )
    def test_of_the_gated_delta_rule(self, options):
        for layout in ("plain", "ragged"):
            problem = delta(layout, **options)
            y, state, report = problem.run(mode="check")
            wanted, stored = by_stock(problem)
            assert same_bits(y, wanted) and same_bits(state, stored)
            assert not report.errors and not report.warnings

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"dims": 12, "state_dim": 32, "heads": 2, "groups": 1},
            {"dims": 8, "state_dim": 256, "heads": 3, "groups": 3},
            {"dims": 8, "state_dim": 128, "heads": 1, "groups": 1},
        ],
    )
    def test_of_mamba2(self, options):
        """Groups of one head, or one group, or one head: mlx-lm's kernel divides by the same."""
        for layout in ("plain", "ragged"):
            problem = mamba(layout, **options)
            y, state, report = problem.run(mode="check")
            exact, exact_state = problem.exact()
            assert is_right(y, exact) and is_right(state, exact_state)
            assert not report.errors and not report.warnings

    def test_what_is_taken(self):
        problem = delta()
        assert gated_delta.takes(problem.rows, problem.state)
        assert not gated_delta.takes(problem.rows, problem.state.astype(mx.float16))
        odd = delta(key_dim=48)
        assert not gated_delta.takes(odd.rows, odd.state)
        many = delta(StepLayout(33, 0, (0,)), value_dim=8)
        assert not gated_delta.takes(many.rows, many.state)
        step = mamba()
        assert ssm.takes(step.rows, step.weights, step.state)
        assert not ssm.takes(step.rows, step.weights, step.state[:, :4])
        small = mamba(state_dim=16)
        assert not ssm.takes(small.rows, small.weights, small.state)
