"""Step attention is used where it is right and wins, by caches that carry it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base as lm_base
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache

from mlx_mtp.backends.metal import attention_layer
from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.attention import step_attention_ops
from mlx_mtp.backends.metal.attention_layer import (
    StepAttention,
    attention_operations,
    use_attention,
)
from mlx_mtp.backends.metal.choice import KernelChoice, choose
from mlx_mtp.backends.metal.operation import Kernel, check
from mlx_mtp.backends.metal.operations import (
    AttentionInputs,
    AttentionKey,
    StepAttentionOperation,
)
from mlx_mtp.backends.metal.setup import choose_all, set_up_kernels
from mlx_mtp.lab.tiny_models import build, tiny_config
from mlx_mtp.model.attention import NAME, AttentionSeam, attention_blocks, inject_attention
from mlx_mtp.model.caches.layers import QuantizedLayerCache
from mlx_mtp.model.layout import quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import replace
from tests.helpers.attention_host import attention
from tests.helpers.kernel_host import run_launch
from tests.helpers.tiny import step_ids, tiny_base, tiny_mtp

KEY = AttentionKey(heads=3, kv_heads=1, head_dim=64, dtype=mx.float32)
OURS = KernelChoice(ours=True)
ROOMY: dict[str, Any] = {
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}
STEP = quadratic_layout(num_pending=1, num_draft_tokens=1, num_masks=1)


class Device(StepAttentionOperation):
    """Attention without a GPU: right results row by row, times and faults as a test wants them.

    Args:
        times: seconds by what runs (``ours``, ``stock``), rows and keys; one second else.
        fault: changes a result of ours; called with the rows, the keys and the result.
        rows: numbers of rows to check.
        counts: numbers of keys to check.
    """

    contexts = (32, 64)

    def __init__(
        self,
        *,
        times: dict[tuple[str, int, int], float] | None = None,
        fault: Callable[[int, int, mx.array], mx.array] = lambda rows, count, y: y,
        rows: tuple[int, ...] = (1, 3),
        counts: tuple[int, ...] = (3, 40),
    ) -> None:
        super().__init__(KEY)
        self.times, self.fault = times or {}, fault
        self.check_rows, self.check_contexts = rows, counts
        self.calls: list[tuple[str, int, int]] = []

    def ours(self, inputs: AttentionInputs, kernel: Kernel) -> mx.array:
        rows, count = inputs.queries.shape[2], inputs.keys.shape[2]
        self.calls.append(("ours", rows, count))
        *arrays, mask = inputs
        return self.fault(rows, count, _row_by_row(*arrays, scale=self.scale, mask=mask))

    def stock(self, inputs: AttentionInputs) -> mx.array:
        self.calls.append(("stock", inputs.queries.shape[2], inputs.keys.shape[2]))
        return super().stock(inputs)

    def seconds(self, calls: Callable[[], list[mx.array]]) -> float:
        calls()
        return self.times.get(self.calls[-1], 1.0)


def _row_by_row(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any
) -> mx.array:
    rows, count = queries.shape[2], keys.shape[2]
    found = []
    for row in range(rows):
        # Hidden keys must not change the bits, so they are left out.
        seen = list(range(count - rows + row + 1)) if mask == "causal" else None
        if isinstance(mask, mx.array):
            seen = [key for key, sees in enumerate(np.array(mask[row])) if sees]
        held = [each if seen is None else each[:, :, mx.array(seen)] for each in (keys, values)]
        found.append(step_attention_ops(queries[:, :, row : row + 1], *held, scale=scale))
    return mx.concatenate(found, axis=2)


FAST = {("ours", rows, count): 0.5 for rows in (1, 8, 16) for count in (32, 64)}


class TestCheck:
    def test_passes_where_all_is_well(self):
        result = check(Device(rows=(1, 2, 5), counts=(1, 33, 130)))
        assert result.kernels and result.problem == ""

    def test_finds_a_wrong_result(self):
        device = Device(fault=lambda rows, count, y: y + (count == 33), rows=(1, 2), counts=(1, 33))
        assert check(device).problem == "attention is wrong at 1 rows and 33 keys"

    def test_finds_bits_that_depend_on_the_number_of_rows(self):
        fault = lambda rows, count, y: y * (1 + 2**-22) if rows == 5 else y  # noqa: E731
        device = Device(fault=fault, rows=(1, 5, 8), counts=(33,))
        assert check(device).problem == "attention gives other bits at 5 rows"

    def test_finds_what_does_not_run(self):
        def fault(rows: int, count: int, y: mx.array) -> mx.array:
            raise RuntimeError("no such thing\nmore")

        assert check(Device(fault=fault)).problem == "attention does not run: no such thing"

    @pytest.mark.slow
    def test_passes_for_the_kernels_themselves(self, on_the_executor):
        operation = StepAttentionOperation(KEY)
        operation.check_rows, operation.check_contexts = (1, 3), (3, 130)
        assert check(operation).problem == ""
        assert on_the_executor


class TestChoice:
    def test_takes_ours_where_they_win(self):
        choice = decide(Device(times=FAST))
        assert choice.ours and choice.ratios == {1: 0.5, 8: 0.5, 16: 0.5}

    def test_never_slows_plain_decoding_at_any_length(self):
        for count in (32, 64):
            choice = decide(Device(times=FAST | {("ours", 1, count): 1.1}))
            assert not choice.ours and choice.why == "stock is faster"

    def test_keeps_stock_where_several_rows_lose(self):
        slow = {("ours", rows, 64): 1.5 for rows in (8, 16)}
        assert not decide(Device(times=FAST | slow)).ours

    def test_keeps_stock_where_the_check_fails_though_asked_for_ours(self):
        broken = Device(times=FAST, fault=lambda rows, count, y: y + 1)
        for mode in ("auto", "ours"):
            choice = choose(broken, mode=mode, generation=15)
            assert not choice.ours and "wrong at 1 rows" in choice.why

    def test_keeps_stock_when_asked_to_or_out_of_time(self):
        device = Device(times=FAST)
        assert not choose(device, mode="stock", generation=15).ours
        assert not choose(device, mode="auto", generation=15, seconds_left=lambda: 0.0).ours
        assert not device.calls


def decide(device: Device) -> KernelChoice:
    return choose(device, mode="auto", generation=15, timer=device.seconds)


@pytest.fixture
def on_the_executor(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Launch]:
    """Kernels run on the CPU executor; the list fills with what was launched."""
    seen: list[kernels.Launch] = []

    def run(launch: kernels.Launch) -> mx.array:
        seen.append(launch)
        return run_launch(launch)[0]

    monkeypatch.setattr(kernels, "run", run)
    return seen


@pytest.fixture
def in_operations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reference stands in for the kernel; the list fills with numbers of rows."""
    seen: list[int] = []

    def attend(queries: mx.array, *held: mx.array, **options: Any) -> mx.array:
        seen.append(queries.shape[2])
        return step_attention_ops(queries, *held, **options)

    monkeypatch.setattr(attention_layer, "step_attention_kernel", attend)
    return seen


def with_attention(model: MTPModel) -> MTPModel:
    keys = [operation.key for operation in attention_operations(model.base)]
    assert use_attention(model.base, dict.fromkeys(keys, OURS))
    return model


def ids(model: MTPModel, *, steps: int = 6) -> list[int]:
    """Greedy ids of steps with mask rows, whose ordinary rows alone are kept."""
    cache = model.make_cache()
    hidden = model(mx.array([[3, 17, 42, 8, 29]]), cache=cache)
    found = [largest(model.logits(hidden)[0, -1])]
    for _ in range(steps):
        hidden = model(step_ids(STEP, [found[-1], 5]), cache=cache, layout=STEP)
        cache.rewind(STEP.num_rows - 1)
        found.append(largest(model.logits(hidden)[0, 0]))
    return found


def largest(logits: mx.array) -> int:
    return int(np.argmax(np.array(logits)))


class TestSeam:
    def test_finds_how_a_model_attends(self):
        key = AttentionKey(2, 1, 64, mx.float32)
        (operation,) = attention_operations(tiny_base(**ROOMY))
        assert operation.key == key and operation.name == key.name
        assert key.name == "attention 2/1 heads of 64 float32"
        assert attention_operations(tiny_base()) == []  # heads of 8

    @pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "gpt_oss"])
    def test_leaves_scores_other_sizes_and_sinks_to_stock_attention(self, family):
        sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
        heads = {"head_dim": 64, "v_head_dim": 32, "hidden_size": 64}
        base = build(tiny_config(family, **sizes, **heads))
        assert attention_blocks(base) and attention_operations(base) == []

    def test_is_restored_and_leaves_mlx_lm_as_it_is(self):
        base = tiny_base(**ROOMY)
        block = base.layers[0].self_attn
        before = inject_attention(base, None)
        assert before == {"model.layers.0.self_attn": block}
        assert isinstance(base.layers[0].self_attn, AttentionSeam)
        assert attention_blocks(base) == {"model.layers.0.self_attn": base.layers[0].self_attn}
        inject_attention(base, None)
        assert base.layers[0].self_attn.wrapped is block
        replace(base, before)
        assert base.layers[0].self_attn is block
        assert vars(llama)[NAME] is lm_base.scaled_dot_product_attention

    def test_parameters_keep_their_names(self):
        base = tiny_base(**ROOMY)
        names = [name for name, _ in tree_flatten(base.parameters())]
        inject_attention(base, None)
        assert [name for name, _ in tree_flatten(base.parameters())] == names

    def test_a_module_replaced_in_a_block_is_used_by_it(self):
        base = tiny_base(**ROOMY)
        inject_attention(base, None)
        before = base(mx.array([[1, 2]]))
        shape = base.layers[0].self_attn.v_proj.weight.shape
        zero = nn.Linear(shape[1], shape[0], bias=False)
        zero.weight = mx.zeros(shape)
        replace(base, {"model.layers.0.self_attn.v_proj": zero})
        assert not mx.allclose(base(mx.array([[1, 2]])), before)

    def test_ids_are_those_of_stock_attention(self, in_operations):
        wanted = ids(tiny_mtp(**ROOMY))
        assert not in_operations
        assert ids(with_attention(tiny_mtp(**ROOMY))) == wanted
        assert set(in_operations) == {5, STEP.num_rows}

    def test_other_models_attend_as_before(self, in_operations):
        with_attention(tiny_mtp(**ROOMY))
        other = tiny_mtp(seed=1, **ROOMY)
        ids(other)
        other.base(mx.array([[1, 2]]), cache=[KVCache()])
        other.base(mx.array([[1, 2]]))
        assert not in_operations

    def test_long_prompts_and_quantised_caches_take_stock_attention(self, in_operations):
        model = with_attention(tiny_mtp(**ROOMY))
        mx.eval(model(mx.array([[5] * 33]), cache=model.make_cache()))
        cache = model.make_cache(kv_bits=8, quantized_kv_start=0)
        mx.eval(model(mx.array([[5, 6]]), cache=cache))
        before = len(in_operations)
        cache.begin_step()
        assert isinstance(cache.layers[0], QuantizedLayerCache)
        mx.eval(model(mx.array([[5, 6]]), cache=cache))
        assert len(in_operations) == before and 33 not in in_operations

    def test_shapes_that_lost_take_stock_attention(self, in_operations):
        problem = attention(2, 9)
        attend = StepAttention({AttentionKey(3, 1, 64, mx.float32): KernelChoice(ours=False)})
        arrays = (problem.queries, problem.keys, problem.values)
        assert attend(*arrays, scale=1.0, mask=None) is None
        assert StepAttention({})(*arrays, scale=1.0, mask=None) is None
        assert not in_operations

    @pytest.mark.slow
    def test_a_step_on_the_executor_has_the_same_hidden_states(self, on_the_executor):
        given = step_ids(STEP, [7, 11])
        found = []
        for model in (tiny_mtp(**ROOMY), with_attention(tiny_mtp(**ROOMY))):
            cache = model.make_cache()
            model(mx.array([[3, 17, 42]]), cache=cache)
            found.append(model(given, cache=cache, layout=STEP))
            mx.eval(found)
        assert mx.allclose(*found, rtol=1e-4, atol=1e-4)
        names = {launch.name for launch in on_the_executor}
        assert {"mlx_mtp_step_attention_causal", "mlx_mtp_step_attention_masked"} <= names


class TestSetup:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))

    def choices(self, device: Device) -> list[KernelChoice]:
        info = {"architecture": "applegpu_g15p"}
        choices = choose_all([device], mode="auto", timer=device.seconds, device=info)
        return list(choices.values())

    def test_decides_once_and_remembers(self):
        device = Device(times=FAST)
        (first,) = self.choices(device)
        assert first.ours and device.calls
        device.calls.clear()
        assert self.choices(device) == [first] and not device.calls

    def test_does_nothing_without_metal(self):
        base = tiny_base(**ROOMY)
        set_up_kernels(base)
        assert not isinstance(base.layers[0].self_attn, AttentionSeam)
