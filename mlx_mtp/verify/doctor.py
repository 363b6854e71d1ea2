"""What a machine does with few rows: whether our kernels are right there, and what rows cost.

The result is one dictionary, made to be attached to a report: the machine and versions and, for
each shape of the model's linear layers and of its attention, the result of the self-check and the
time of a layer by number of rows with stock MLX and with ours.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.backends.device import gpu_info, machine_name
from mlx_mtp.backends.metal.attention_layer import attention_operations
from mlx_mtp.backends.metal.choice import gpu_generation
from mlx_mtp.backends.metal.layers import matmul_operations
from mlx_mtp.backends.metal.matmul import MAX_ROWS
from mlx_mtp.backends.metal.operation import Check, Kernel, Operation, check
from mlx_mtp.backends.metal.setup import choose_all, has_metal
from mlx_mtp.storage.package import package_version

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32)
CONTEXT = 1024  # keys for attention
MAX_LAYERS = 8  # per shape; more would only take longer
ROUNDS = 5

Say = Callable[[str], None]


def examine(
    base: nn.Module, *, name: str, rows: Sequence[int] = ROWS, say: Say = lambda text: None
) -> dict[str, Any]:
    """Check our kernels and time rows on a model's layers.

    Args:
        base: a model without an adapter and without our kernels.
        name: name of the model in the report.
        rows: numbers of rows to time.
        say: called with a line of text before each part of the work.
    """
    matmuls, attentions = matmul_operations(base), attention_operations(base)
    shapes, attention = [], []
    for number, matmul in enumerate(matmuls, start=1):
        say(f"Examining {matmul.name} ({number}/{len(matmuls)}) ...")
        entry = {"shape": matmul.name, "layers": len(matmul.layers)}
        shapes.append(entry | _examine(matmul, rows, context=0))
    for operation in attentions:
        say(f"Examining {operation.name} ...")
        entry = {"shape": f"{operation.name}, {CONTEXT} keys"}
        attention.append(entry | _examine(operation, rows, context=CONTEXT))
    choices = {}
    if has_metal():
        say("Benchmarking ...")
        packed = [matmul for matmul in matmuls if matmul.weights]
        chosen = choose_all([*packed, *attentions], mode="auto", cached=False)
        choices = {name: choice.why for name, choice in chosen.items()}
    checks = [entry["check"] for entry in (*shapes, *attention) if entry["check"]]
    return {
        "mlx_mtp": package_version(),
        "machine": machine(),
        "model": name,
        "shapes": shapes,
        "attention": attention,
        "choices": choices,
        "step_ms": {kind: _step_ms(shapes, kind, rows) for kind in ("stock", "ours")},
        "passed": all(result["passed"] for result in checks),
    }


def machine() -> dict[str, Any]:
    """Describe the machine, its GPU and the relevant versions."""
    device = mx.default_device()
    info = gpu_info()
    return {
        "device": "gpu" if device.type == mx.gpu else "cpu",
        "has_metal": has_metal(),
        "architecture": str(info.get("architecture", platform.machine())),
        "generation": gpu_generation(str(info.get("architecture", ""))),
        "name": machine_name(info),
        "memory_bytes": info.get("memory_size"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "blas": BLAS,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
    }


def _examine(operation: Operation, rows: Sequence[int], *, context: int) -> dict[str, Any]:
    """Check an operation and time one layer by number of rows."""
    result, report = None, None
    if has_metal() and operation.is_supported:
        result = check(operation)
        has_gated = operation.with_gated_lora() is not None
        report = {
            "passed": bool(result.kernels) and result.gated >= has_gated,
            "matrix_simdgroups": result.matrix.simdgroups if result.matrix else 0,
            "problem": result.problem,
        }
    return {
        "check": report,
        "stock_ms": _times(operation, lambda count: None, rows, context),
        "ours_ms": _times(operation, lambda count: _kernel(result, count), rows, context)
        if result and result.kernels
        else {},
    }


def _kernel(result: Check, rows: int) -> Kernel | None:
    """Our kernel for so many rows; None for stock MLX, which takes any number."""
    if rows > MAX_ROWS:
        return None
    matrix = result.matrix
    return matrix if matrix and rows >= matrix.min_rows else result.kernels[0]


def _times(
    operation: Operation,
    kernel_for: Callable[[int], Kernel | None],
    rows: Sequence[int],
    context: int,
) -> dict[str, float]:
    """Milliseconds of one layer by number of rows; medians over rounds that go through all."""
    inputs = {count: operation.benchmark_inputs(count, context)[:MAX_LAYERS] for count in rows}
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(1 + ROUNDS):
        for count in rows:
            kernel = kernel_for(count)
            start = time.perf_counter()
            mx.eval(
                [
                    operation.stock(layer) if kernel is None else operation.ours(layer, kernel)
                    for layer in inputs[count]
                ]
            )
            times[count].append((time.perf_counter() - start) * 1e3 / len(inputs[count]))
    return {str(count): statistics.median(times[count][1:]) for count in rows}


def _step_ms(shapes: Sequence[dict[str, Any]], kind: str, rows: Sequence[int]) -> dict[str, float]:
    """Milliseconds of all linear layers of a step by number of rows."""
    if not all(shape[f"{kind}_ms"] for shape in shapes):
        return {}
    return {
        str(count): sum(shape["layers"] * shape[f"{kind}_ms"][str(count)] for shape in shapes)
        for count in rows
    }


def table(report: dict[str, Any]) -> list[str]:
    """Format a report as lines of text."""
    info = report["machine"]
    lines = [
        f"{info['name']}, {info['architecture']}, MLX {info['versions']['mlx']}, {info['system']}",
        "",
        _kernels_line(report),
        "",
        "cost of M rows over the cost of one",
    ]
    rows = list(report["shapes"][0]["stock_ms"])
    entries = [*report["shapes"], *report["attention"]]
    width = max(len(entry["shape"]) for entry in entries) + 8
    lines.append("".ljust(width) + "".join(f"M={count}".rjust(7) for count in rows) + "   M=1 ms")
    for entry in entries:
        for kind in ("stock", "ours"):
            lines += _cost_line(f"{entry['shape']}  {kind}", entry[f"{kind}_ms"], width)
    for kind in ("stock", "ours"):
        lines += _cost_line(f"all layers  {kind}", report["step_ms"][kind], width)
    return lines


def _kernels_line(report: dict[str, Any]) -> str:
    if not report["machine"]["has_metal"]:
        return "our kernels: not checked, there is no Metal GPU here; stock MLX is used"
    entries = [entry for entry in (*report["shapes"], *report["attention"]) if entry["check"]]
    wrong = [
        f"{entry['shape']}: {entry['check']['problem']}"
        for entry in entries
        if not entry["check"]["passed"]
    ]
    if wrong:
        return "our kernels: WRONG here, and not used for " + "; ".join(wrong)
    return f"our kernels: right on all {len(entries)} shapes"


def _cost_line(label: str, times: dict[str, float], width: int) -> list[str]:
    if not times:
        return []
    first = next(iter(times.values()))
    ratios = "".join(f"{time / first:7.2f}" for time in times.values())
    return [label.ljust(width) + ratios + f"   {first:.3f}"]
