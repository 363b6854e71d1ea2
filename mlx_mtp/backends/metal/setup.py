"""Choosing kernels when a model is loaded, once per machine and model.

Checks and benchmarks take up to a second.  The choices are cached by machine, MLX, kernels and the
model's shapes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.device import gpu_marks
from mlx_mtp.backends.metal.attention_layer import attention_operations, use_attention
from mlx_mtp.backends.metal.choice import (
    KernelChoice,
    Mode,
    choose,
    gpu_generation,
    kernel_mode,
)
from mlx_mtp.backends.metal.layers import matmul_operations, use_kernels
from mlx_mtp.backends.metal.matmul import kernel_header
from mlx_mtp.backends.metal.operation import Operation, Timer, median_seconds
from mlx_mtp.backends.metal.recurrence_layer import recurrence_operations, use_recurrence
from mlx_mtp.storage.keyed_cache import KeyedCache

BENCHMARK_SECONDS = 1.0

Report = Callable[[str], None]


def has_metal() -> bool:
    """Whether models run on a Metal GPU here."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def set_up_kernels(base: nn.Module, *, report: Report = lambda line: None) -> int:
    """Let a loaded model use our kernels where they are faster on this machine, in place.

    Args:
        base: an mlx-lm model, its adapter attached.
        report: called with a line of text before a benchmark.

    Returns:
        Number of layers that use them.

    Raises:
        ValueError: ``MLX_MTP_KERNELS`` has an unknown value.
    """
    mode = kernel_mode()
    if mode == "stock" or not has_metal():
        return 0
    matmuls = [matmul for matmul in matmul_operations(base) if matmul.weights]
    attention = attention_operations(base)
    recurrences = recurrence_operations(base)
    choices = choose_all([*matmuls, *attention, *recurrences], mode=mode, report=report)
    use_attention(base, {operation.key: choices[operation.name] for operation in attention})
    use_recurrence(base, {operation.key: choices[operation.name] for operation in recurrences})
    return use_kernels(base, choices)


def choose_all(
    operations: Sequence[Operation],
    *,
    mode: Mode,
    report: Report = lambda line: None,
    device: Mapping[str, Any] | None = None,
    timer: Timer = median_seconds,
    cached: bool = True,
) -> dict[str, KernelChoice]:
    """Choose what computes each operation, within one time limit, or read it from the cache.

    Args:
        operations: of a model; the first ones are benchmarked first.
        mode: from ``kernel_mode``.
        report: called with a line of text before a benchmark.
        device: ``mx.device_info()``.
        timer: times calls.
        cached: whether to read and write the cache.

    Returns:
        Choices by name of the operation.
    """
    if not operations:
        return {}
    info = dict(mx.device_info() if device is None else device)
    names = [operation.name for operation in operations]
    cache = _cache(info, mode, names)
    choices = cache.read(lambda values: _decode(values, names)) if cached else None
    if choices is not None:
        return choices
    report("Choosing kernels for this machine ...")
    generation = gpu_generation(str(info.get("architecture", "")))
    deadline = time.perf_counter() + BENCHMARK_SECONDS
    choices = {
        operation.name: choose(
            operation,
            mode=mode,
            generation=generation,
            timer=timer,
            seconds_left=lambda: deadline - time.perf_counter(),
        )
        for operation in operations
    }
    if cached:
        cache.write({name: dataclasses.asdict(choice) for name, choice in choices.items()})
    return choices


def _cache(info: Mapping[str, Any], mode: Mode, names: Sequence[str]) -> KeyedCache:
    text = hashlib.sha256(kernel_header().encode()).hexdigest()
    return KeyedCache("kernels", [*gpu_marks(info), mode, version("mlx"), text, *sorted(names)])


def _decode(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, KernelChoice]:
    return {name: KernelChoice.from_dict(values[name]) for name in names}
