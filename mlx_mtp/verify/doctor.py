"""What a machine does with few rows: whether our kernels are right there, and what rows cost.

The result is one dictionary, made to be attached to a report: the machine and versions, for each
shape of the model's linear layers and of its attention what the self-check found, and the time of a
layer by number of rows with stock MLX and with ours.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.backends.device import gpu_info, machine_name
from mlx_mtp.backends.metal.attention_choice import MetalAttention
from mlx_mtp.backends.metal.checks import MetalRunner, self_check
from mlx_mtp.backends.metal.choice import gpu_generation
from mlx_mtp.backends.metal.layers import packed_weight, shape_key
from mlx_mtp.backends.metal.matmul import PackedWeight
from mlx_mtp.backends.metal.setup import all_choices, has_metal, shape_name
from mlx_mtp.storage.package import package_version
from mlx_mtp.verify.doctor_attention import examine_attention

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32)
MOST_LAYERS = 8  # of a shape that are timed; more would only take longer
ROUNDS = 5

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one shape and kind.

    Attributes:
        name: for people.
        count: how many the model has.
        calls: map rows ``[1, M, K]``, of a few of the layers.
        inputs: K.
        dtype: of the rows.
        weights: of the same layers, where they are packed.
    """

    name: str
    count: int
    calls: list[Callable[[mx.array], mx.array]]
    inputs: int
    dtype: mx.Dtype
    weights: list[PackedWeight]


def layer_groups(base: nn.Module) -> list[LayerGroup]:
    """The linear layers and the unembedding of a model, by shape, the largest first."""
    found: dict[str, list[tuple[Any, Callable[[mx.array], mx.array]]]] = {}
    has_head = "lm_head" in base
    for _, layer in base.named_modules():
        if isinstance(layer, nn.Linear | nn.QuantizedLinear):
            found.setdefault(_name(layer), []).append((layer, layer))
        elif isinstance(layer, nn.Embedding | nn.QuantizedEmbedding) and not has_head:
            found.setdefault(_name(layer), []).append((layer, layer.as_linear))
    groups = [_group(name, layers) for name, layers in found.items()]
    return sorted(groups, key=lambda each: -each.inputs * each.count)


def _group(name: str, layers: Sequence[tuple[Any, Callable[[mx.array], mx.array]]]) -> LayerGroup:
    some = layers[:MOST_LAYERS]
    packed = [packed_weight(layer) for layer, _ in some]
    first = some[0][0]
    weights = [each for each in packed if each is not None]
    inputs = weights[0].shape[1] if weights else first.weight.shape[1]
    dtype = weights[0].scales.dtype if weights else first.weight.dtype
    calls = [call for _, call in some]
    return LayerGroup(name, len(layers), calls, inputs, dtype, weights)


def _name(layer: Any) -> str:
    packed = packed_weight(layer)
    if packed is not None:
        return shape_name(shape_key(packed))
    outputs, inputs = layer.weight.shape
    return f"{outputs}x{inputs} {str(layer.weight.dtype).removeprefix('mlx.core.')}"


def examine(
    base: nn.Module, *, name: str, rows: Sequence[int] = ROWS, say: Say = lambda text: None
) -> dict[str, Any]:
    """Check our kernels and time rows on a model's layers.

    Args:
        base: a model without an adapter and without our kernels in it.
        name: what the report calls it.
        rows: numbers of rows to time.
        say: called with a line about what is going on.
    """
    groups = layer_groups(base)
    shapes = []
    for number, group in enumerate(groups, start=1):
        say(f"Examining {group.name} ({number}/{len(groups)}) ...")
        shapes.append(_examine_group(group, rows))
    attention = examine_attention(base, rows=rows, has_metal=has_metal(), say=say)
    choices = {}
    if has_metal():
        say("Racing ...")
        found = all_choices(
            base, mode="auto", runner=MetalRunner(), attention=MetalAttention(), keep=False
        )
        choices = {shape_name(key): choice.why for key, choice in found.layers.items()}
        choices |= {key.name: choice.why for key, choice in found.attention.items()}
    return {
        "mlx_mtp": package_version(),
        "machine": machine(),
        "model": name,
        "shapes": shapes,
        "attention": attention,
        "choices": choices,
        "step_ms": {kind: _step_ms(shapes, kind, rows) for kind in ("stock", "ours")},
        "passed": all(each["check"]["passed"] for each in (*shapes, *attention) if each["check"]),
    }


def machine() -> dict[str, Any]:
    """The machine, its GPU and the versions that matter."""
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
        "versions": {each: version(each) for each in ("mlx", "mlx-lm")},
    }


def _examine_group(group: LayerGroup, rows: Sequence[int]) -> dict[str, Any]:
    check = None
    ours: list[Callable[[mx.array], mx.array]] = []
    if has_metal() and group.weights and group.weights[0].is_supported:
        found = self_check(group.weights[0], MetalRunner())
        passed = found.scalar and found.gated
        check = {
            "passed": passed,
            "matrix_simdgroups": found.matrix,
            "problem": found.problem,
        }
        if found.scalar:
            ours = [_our_call(each, found.matrix) for each in group.weights]
    return {
        "shape": group.name,
        "layers": group.count,
        "check": check,
        "stock_ms": _times(group, group.calls, rows),
        "ours_ms": _times(group, ours, rows) if ours else {},
    }


def _our_call(packed: PackedWeight, matrix: int) -> Callable[[mx.array], mx.array]:
    runner = MetalRunner()

    def call(x: mx.array) -> mx.array:
        takes_matrix = matrix and x.shape[-2] >= 4
        return runner.ours(
            x, packed, variant="matrix" if takes_matrix else "scalar", simdgroups=matrix or 16
        )

    return call


def _times(
    group: LayerGroup, calls: Sequence[Callable[[mx.array], mx.array]], rows: Sequence[int]
) -> dict[str, float]:
    """Milliseconds of one layer by number of rows; a median over rounds that go through all."""
    inputs = {
        each: mx.random.normal((1, each, group.inputs), key=mx.random.key(each)).astype(group.dtype)
        for each in rows
    }
    mx.eval(inputs)
    times: dict[int, list[float]] = {each: [] for each in rows}
    for _ in range(1 + ROUNDS):
        for each in rows:
            began = time.perf_counter()
            mx.eval([call(inputs[each]) for call in calls])
            times[each].append((time.perf_counter() - began) * 1e3 / len(calls))
    return {str(each): statistics.median(times[each][1:]) for each in rows}


def _step_ms(shapes: Sequence[dict[str, Any]], kind: str, rows: Sequence[int]) -> dict[str, float]:
    """Milliseconds of all linear layers of a step by number of rows."""
    if not all(shape[f"{kind}_ms"] for shape in shapes):
        return {}
    return {
        str(each): sum(shape["layers"] * shape[f"{kind}_ms"][str(each)] for shape in shapes)
        for each in rows
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    info = report["machine"]
    lines = [
        f"{info['name']}, {info['architecture']}, MLX {info['versions']['mlx']}, {info['system']}",
        "",
        _kernels_line(report),
        "",
        "cost of M rows over the cost of one",
    ]
    rows = list(report["shapes"][0]["stock_ms"])
    everything = [*report["shapes"], *report["attention"]]
    width = max(len(each["shape"]) for each in everything) + 8
    lines.append("".ljust(width) + "".join(f"M={each}".rjust(7) for each in rows) + "   M=1 ms")
    for shape in everything:
        for kind in ("stock", "ours"):
            lines += _cost_line(f"{shape['shape']}  {kind}", shape[f"{kind}_ms"], width)
    for kind in ("stock", "ours"):
        lines += _cost_line(f"all layers  {kind}", report["step_ms"][kind], width)
    return lines


def _kernels_line(report: dict[str, Any]) -> str:
    if not report["machine"]["has_metal"]:
        return "our kernels: not checked, there is no Metal GPU here; stock MLX does the work"
    everything = [*report["shapes"], *report["attention"]]
    checked = [shape["check"] for shape in everything if shape["check"]]
    bad = [
        f"{shape['shape']}: {shape['check']['problem']}"
        for shape in everything
        if shape["check"] and not shape["check"]["passed"]
    ]
    if bad:
        return "our kernels: WRONG here, and not used for " + "; ".join(bad)
    return f"our kernels: right on all {len(checked)} shapes"


def _cost_line(label: str, times: dict[str, float], width: int) -> list[str]:
    if not times:
        return []
    first = next(iter(times.values()))
    ratios = "".join(f"{each / first:7.2f}" for each in times.values())
    return [label.ljust(width) + ratios + f"   {first:.3f}"]
