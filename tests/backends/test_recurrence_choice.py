"""The kernels of recurrent layers are used where they are right and win, and give the same ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import mamba2

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.choice import KernelChoice, choose
from mlx_mtp.backends.metal.matmul import Launch
from mlx_mtp.backends.metal.operation import check
from mlx_mtp.backends.metal.recurrence_layer import recurrence_operations, use_recurrence
from mlx_mtp.backends.metal.recurrence_operations import (
    DeltaKey,
    GatedDeltaOperation,
    RecurrenceInputs,
    RecurrenceOperation,
    SsmKey,
    SsmOperation,
)
from mlx_mtp.lab.hybrid_step import random_model
from mlx_mtp.model.layout import StepLayout, plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.kernel_host import run_launch_all
from tests.helpers.tiny import step_ids, tiny_base

DELTA = DeltaKey(key_heads=2, heads=4, key_dim=32, value_dim=8, by_key=False, dtype=mx.float32)
SSM = SsmKey(groups=1, heads=2, dims=8, state_dim=32, dtype=mx.float32)
STEP = StepLayout(1, 2, (2, 0, 1))


def small(kind: type[RecurrenceOperation]) -> Any:
    """The operation of a small shape, with few numbers of rows to check."""
    operation: Any = (
        GatedDeltaOperation(DELTA) if kind is GatedDeltaOperation else SsmOperation(SSM)
    )
    operation.check_rows = (1, 3, 6)
    return operation


def tiny_mamba2() -> MTPModel:
    """Two layers of Mamba2, random."""
    args = mamba2.ModelArgs(
        model_type="mamba2",
        num_heads=4,
        head_dim=16,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        state_size=32,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=False,
        time_step_limit=(0.001, 100.0),
        time_step_rank="auto",
    )
    base: Any = mamba2.Model(args)
    rng = np.random.default_rng(0)
    flat: Any = tree_flatten(base.parameters())
    drawn = [(name, mx.array(rng.standard_normal(x.shape) * 0.3, x.dtype)) for name, x in flat]
    base.update(tree_unflatten(drawn))
    base.eval()
    return MTPModel(base)


def tiny_delta_net() -> MTPModel:
    """A layer of Gated DeltaNet and one of attention, random."""
    return random_model(hidden=128, layers=2, interval=2, fast=False)


MODELS = {"gated delta": tiny_delta_net, "ssm": tiny_mamba2}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels run on the CPU executor; the list fills with what was launched."""
    seen: list[Launch] = []

    def run_all(launch: Launch) -> list[mx.array]:
        seen.append(launch)
        return run_launch_all(launch)[0]

    monkeypatch.setattr(kernels, "run_all", run_all)
    return seen


@pytest.mark.parametrize("kind", [GatedDeltaOperation, SsmOperation])
class TestCheck:
    def test_passes_for_the_kernel_itself(self, kind, launched):
        assert check(small(kind)).problem == "" and launched

    def test_finds_a_wrong_result_state_or_order(self, kind, launched, monkeypatch):
        faults: dict[str, Callable[[Any, mx.array, mx.array], tuple[mx.array, mx.array]]] = {
            "is wrong at 3 rows": lambda inputs, y, s: (y + 0.1 * (y.shape[0] == 3), s),
            "stores a wrong state": lambda inputs, y, s: (y, s + 0.1),
            "gives other bits at 3 rows": lambda inputs, y, s: (
                y * (1 + 2**-22) if inputs.runs.num_ordinary == 3 else y, s
            ),
            "gives other bits after the state": lambda inputs, y, s: (y, s * (1 + 2**-22)),
        }  # fmt: skip
        step = kind.step
        for problem, fault in faults.items():

            def faulty(self, inputs, fault=fault):
                return fault(inputs, *step(self, inputs))

            monkeypatch.setattr(kind, "step", faulty)
            assert problem in check(small(kind)).problem

    def test_takes_ours_where_it_wins(self, kind, launched):
        calls: list[str] = []

        class Timed(kind):
            def step(self, inputs: RecurrenceInputs) -> tuple[mx.array, mx.array]:
                calls.append("ours")
                return self.step_ops(inputs)

            def stock(self, inputs: RecurrenceInputs) -> mx.array:
                calls.append("stock")
                return super().stock(inputs)

        operation: Any = Timed(small(kind).key)
        operation.check_rows = (1, 3)
        for seconds, ours in ((0.5, True), (2.0, False)):

            def timer(run: Callable[[], Any], seconds: float = seconds) -> float:
                run()
                return seconds if calls[-1] == "ours" else 1.0

            choice = choose(operation, mode="auto", generation=15, timer=timer)
            assert choice.ours == ours and choice.ratios[8] == seconds

    def test_stock_gives_what_the_plain_operations_give(self, kind):
        operation = small(kind)
        for layout in (STEP, plain_layout()):
            inputs = operation.draw(layout, num_kept=2)
            assert mx.allclose(operation.stock(inputs), operation.reference(inputs), atol=1e-4)


def steps(model: MTPModel, *, accepted: tuple[int, ...] = (1, 3, 2)) -> tuple[list[int], list[Any]]:
    """Greedy ids of steps after a prompt, and the hidden states of each step."""
    cache = model.make_cache()
    hidden = model(mx.array([[3, 17, 42, 8, 29]]), cache=cache)
    ids, found = [_largest(model.logits(hidden)[0, -1])], []
    for kept in accepted:
        hidden = model(step_ids(STEP, [ids[-1], 5, 9]), cache=cache, layout=STEP)
        found.append(np.array(hidden))
        cache.rewind(STEP.num_rows - kept)
        ids.append(_largest(model.logits(hidden)[0, kept - 1]))
    return ids, found


def _largest(logits: mx.array) -> int:
    return int(np.argmax(np.array(logits)))


@pytest.mark.parametrize("name", MODELS)
class TestSeam:
    def test_a_step_is_one_launch_per_layer_with_the_same_ids(self, name, launched):
        ids, hidden = steps(MODELS[name]())
        model = MODELS[name]()
        operations = recurrence_operations(model.base)
        choices: Any = {operation.key: KernelChoice(ours=True) for operation in operations}
        assert use_recurrence(model.base, choices) and not launched
        ours, ours_hidden = steps(model)
        assert ours == ids
        for theirs, own in zip(hidden, ours_hidden, strict=True):
            np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
        layers = len(model.make_cache().recurrent_layers)
        assert len(launched) == len(hidden) * layers

    def test_shapes_that_lost_keep_stock(self, name, launched):
        model = MODELS[name]()
        choices: Any = {
            operation.key: KernelChoice(ours=False)
            for operation in recurrence_operations(model.base)
        }
        assert choices and not use_recurrence(model.base, choices)
        steps(model)
        assert not launched


def test_names_say_the_shape():
    (delta,) = recurrence_operations(tiny_delta_net().base)
    assert delta.name == "gated delta 2/1 heads of 128x128 float32"
    (ssm,) = recurrence_operations(tiny_mamba2().base)
    assert ssm.name == "ssm 4/1 heads of 16x32 float32"
    assert recurrence_operations(MTPModel(tiny_base()).base) == []
