"""Kernels are used where they are right and faster, and stock MLX everywhere else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.choice import KernelChoice, choose, gpu_generation, kernel_mode
from mlx_mtp.backends.metal.layers import matmul_operations
from mlx_mtp.backends.metal.matmul import PackedWeight
from mlx_mtp.backends.metal.operation import Kernel, check
from mlx_mtp.backends.metal.operations import GatedMatmul, Matmul, MatmulInputs
from mlx_mtp.backends.metal.setup import choose_all, set_up_kernels
from tests.helpers.kernel_host import random_weight, run_launch

PACKED = random_weight(16, 128)


class Device(Matmul):
    """A matmul without a GPU: right results row by row, times and faults as a test wants them.

    Args:
        times: seconds by what runs (``stock``, ``scalar``, ``matrix``) and rows; one second else.
        fault: changes a result; called with what runs, the rows and the result.
    """

    def __init__(
        self,
        *,
        times: dict[tuple[str, int], float] | None = None,
        fault: Callable[[str, int, mx.array], mx.array] = lambda what, rows, y: y,
        packed: PackedWeight = PACKED,
    ) -> None:
        super().__init__(packed.name, weights=[packed])
        self.times, self.fault = times or {}, fault
        self.calls: list[tuple[str, int]] = []

    def ours(self, inputs: MatmulInputs, kernel: Kernel) -> mx.array:
        x, layer = inputs
        self.calls.append((kernel.variant, x.shape[0]))
        return self.fault(kernel.variant, x.shape[0], _row_by_row(x, self.weights[layer]))

    def stock(self, inputs: MatmulInputs) -> mx.array:
        x, layer = inputs
        self.calls.append(("stock", x.shape[0]))
        return _row_by_row(x, self.weights[layer])

    def with_gated_lora(self) -> GatedMatmul:
        return GatedDevice(self)

    def seconds(self, calls: Callable[[], list[mx.array]]) -> float:
        calls()
        return self.times.get(self.calls[-1], 1.0)


class GatedDevice(GatedMatmul):
    """The same with gated low-rank weights."""

    def __init__(self, plain: Device) -> None:
        super().__init__(plain)
        self.device = plain

    def ours(self, inputs: MatmulInputs, kernel: Kernel) -> mx.array:
        x, layer = inputs
        low = self._low_rank[layer]
        y = _row_by_row(x, self.weights[layer])
        y = mx.concatenate([y[: low.gate_split], y[low.gate_split :] + low.product(x)])
        return self.device.fault(f"gated {kernel.variant}", x.shape[0], y)


def _row_by_row(x: mx.array, packed: PackedWeight) -> mx.array:
    weight = mx.dequantize(
        packed.weight, packed.scales, packed.biases, group_size=packed.group_size, bits=packed.bits
    )
    return mx.concatenate([row[None] @ weight.T for row in x])


def decide(
    device: Device, *, mode: Any = "auto", generation: int | None = 15, **options: Any
) -> KernelChoice:
    return choose(device, mode=mode, generation=generation, timer=device.seconds, **options)


def variants(device: Matmul) -> tuple[bool, int, bool]:
    """Whether the scalar variant is right, the matrix variant's simdgroups, and gated LoRA."""
    result = check(device)
    return bool(result.kernels), result.matrix.simdgroups if result.matrix else 0, result.gated


@pytest.fixture
def on_the_executor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Matmul]:
    """Makes matmuls whose kernels run on the CPU executor."""

    def make(**options: Any) -> Matmul:
        monkeypatch.setattr(kernels, "run", lambda launch: run_launch(launch, **options)[0])
        matmul = Matmul(PACKED.name, weights=[PACKED])
        matmul.check_rows = (1, 4, 9)
        return matmul

    return make


FAST = {
    (what, rows): seconds
    for what, seconds in (("scalar", 0.5), ("matrix", 0.4))
    for rows in (1, 4, 8, 16)
}


class TestCheck:
    def test_passes_where_all_is_well(self):
        assert variants(Device()) == (True, 16, True)

    @pytest.mark.slow
    def test_passes_for_the_kernels_themselves(self, on_the_executor):
        matmul = on_the_executor()
        assert variants(matmul) == (True, 16, True) and check(matmul).problem == ""

    @pytest.mark.slow
    def test_finds_matrix_units_that_add_in_another_order(self, on_the_executor):
        result = check(on_the_executor(sum_order="descending"))
        assert result.kernels and not result.matrix and "another order" in result.problem

    def test_finds_a_wrong_result_at_one_number_of_rows(self):
        device = Device(fault=lambda what, rows, y: y + 1 if rows == 9 else y)
        assert not check(device).kernels

    def test_finds_bits_that_depend_on_the_number_of_rows(self):
        device = Device(fault=lambda what, rows, y: y * (1 + 2**-22) if rows == 3 else y)
        result = check(device)
        assert not result.kernels and "other bits at 3 rows" in result.problem

    def test_finds_a_row_that_has_other_bits_alone(self):
        device = Device()
        last = device.ours(device.ordered_rows(32)(31, 32), Kernel())

        def fault(what: str, rows: int, y: mx.array) -> mx.array:
            is_last = rows == 1 and mx.array_equal(y, last).item()
            return y * (1 + 2**-22) if is_last else y

        result = check(Device(fault=fault))
        assert not result.kernels and "other bits for row 31 alone" in result.problem

    def test_finds_a_result_that_is_not_a_number(self):
        device = Device(fault=lambda what, rows, y: y * mx.array(float("nan")))
        assert not check(device).kernels

    def test_tries_smaller_threadgroups_where_large_ones_fail(self):
        class Small(Device):
            def ours(self, inputs, kernel):
                if kernel == Kernel("matrix", 16):
                    raise RuntimeError("threadgroup size 512 is larger than 448\nmore")
                return super().ours(inputs, kernel)

        assert variants(Small()) == (True, 8, True)

    def test_leaves_the_gated_kernel_out_where_it_changes_ordinary_rows(self):
        fault = lambda what, rows, y: y + 1e-3 if what == "gated scalar" else y  # noqa: E731
        result = check(Device(fault=fault))
        assert result.kernels and not result.gated and "changes ordinary rows" in result.problem


class TestChoice:
    def test_takes_ours_where_they_win(self):
        choice = decide(Device(times=FAST))
        assert choice.ours and choice.gated
        assert [choice.variant(rows) for rows in (1, 3, 4, 32, 33)] == [
            "scalar", "scalar", "matrix", "matrix", None,
        ]  # fmt: skip
        assert choice.ratios[8] == 0.4

    def test_never_slows_plain_decoding(self):
        choice = decide(Device(times=FAST | {("scalar", 1): 1.1}))
        assert not choice.ours and choice.why == "stock is faster"

    def test_keeps_stock_where_several_rows_lose(self):
        slow = {(what, rows): 2.0 for what in ("scalar", "matrix") for rows in (4, 8, 16)}
        assert not decide(Device(times={("scalar", 1): 0.9} | slow)).ours

    def test_uses_the_matrix_units_from_where_they_win(self):
        choice = decide(Device(times=FAST | {("matrix", 4): 0.9}))
        assert choice.matrix_from == 8 and choice.variant(4) == "scalar"

    def test_asks_no_matrix_units_of_a_generation_that_nobody_has_tried(self):
        device = Device(times=FAST)
        assert decide(device, generation=17).matrix_from == 0
        assert decide(device, generation=None).matrix_from == 0
        assert decide(device, generation=17, mode="ours").matrix_from == 4

    def test_keeps_stock_where_the_check_fails_though_asked_for_ours(self):
        broken = Device(times=FAST, fault=lambda what, rows, y: y + 1)
        for mode in ("auto", "ours"):
            choice = decide(broken, mode=mode)
            assert not choice.ours and "wrong at 32 rows" in choice.why

    def test_keeps_stock_when_asked_to_or_out_of_time(self):
        device = Device(times=FAST)
        assert not decide(device, mode="stock").ours
        assert not decide(device, seconds_left=lambda: 0.0).ours
        assert not device.calls

    def test_survives_a_file(self):
        choice = decide(Device(times=FAST))
        assert KernelChoice.from_dict(json.loads(json.dumps(dataclasses.asdict(choice)))) == choice


def test_generation_of_a_gpu():
    assert gpu_generation("applegpu_g16s") == 16
    assert gpu_generation("applegpu_g13d") == 13
    assert gpu_generation("sm_90") is None


def test_switch(monkeypatch):
    assert kernel_mode() == "auto"
    monkeypatch.setenv("MLX_MTP_KERNELS", "theirs")
    with pytest.raises(
        ValueError, match="MLX_MTP_KERNELS is 'theirs'; it may be auto, ours, stock"
    ):
        kernel_mode()


class TestSetup:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
        self.folder = tmp_path / "kernels"

    def base(self) -> nn.Module:
        base = nn.Sequential(nn.Linear(128, 16, bias=False), nn.Linear(128, 16, bias=False))
        nn.quantize(base, group_size=64, bits=4)
        return base

    def choices(self, device: Device, **info: object) -> list[KernelChoice]:
        self.lines: list[str] = []
        choices = choose_all(
            [device], mode="auto", timer=device.seconds, report=self.lines.append,
            device={"architecture": "applegpu_g15p", "memory_size": 1} | info,
        )  # fmt: skip
        return list(choices.values())

    def test_layers_of_one_shape_are_one_operation(self):
        (operation,) = matmul_operations(self.base())
        assert operation.name == "16x128 4-bit g64 float32" and len(operation.weights) == 2
        assert operation.is_supported

    def test_decides_once_for_each_shape_and_machine(self):
        device = Device(times=FAST)
        (first,) = self.choices(device)
        assert first.ours and self.lines
        device.calls.clear()
        assert self.choices(device) == [first]
        assert not device.calls and not self.lines
        assert self.choices(device, architecture="applegpu_g16s") and device.calls

    def test_decides_again_where_the_file_is_damaged(self):
        self.choices(Device(times=FAST))
        (file,) = self.folder.iterdir()
        for text in ("", "{}", "[]", '{"16x128 4-bit g64 float32": {"ours": 1}}'):
            file.write_text(text)
            (choice,) = self.choices(Device(times=FAST))
            assert choice.ours and self.lines

    def test_does_nothing_without_metal(self):
        base = self.base()
        assert set_up_kernels(base) == 0
        layers = base.children()["layers"]
        assert [type(layer) for layer in layers] == [nn.QuantizedLinear] * 2
