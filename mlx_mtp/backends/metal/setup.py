"""Choosing kernels for a model when it is loaded, once for each machine.

The choice takes up to a second of self-checks and races.  It is kept in the cache folder by
machine, MLX, kernels and the model's shapes; any of them changes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backends.device import gpu_marks
from mlx_mtp.backends.metal.attention_choice import (
    AttentionRunner,
    MetalAttention,
    choose_attention,
)
from mlx_mtp.backends.metal.attention_layer import AttentionKey, attention_keys, use_attention
from mlx_mtp.backends.metal.checks import MetalRunner, Runner
from mlx_mtp.backends.metal.choice import (
    KernelChoice,
    Mode,
    choice_from_dict,
    choice_to_dict,
    choose,
    gpu_generation,
    kernel_mode,
)
from mlx_mtp.backends.metal.layers import ShapeKey, use_kernels, weights_by_shape
from mlx_mtp.backends.metal.matmul import PackedWeight, kernel_header
from mlx_mtp.storage.default_model import cache_dir
from mlx_mtp.storage.files import write_atomically

RACE_SECONDS = 1.0


def has_metal() -> bool:
    """Whether models run on a Metal GPU here."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


@dataclass(frozen=True)
class Choices:
    """What a model uses on a machine.

    Attributes:
        layers: by the shape of a layer's weight.
        attention: by the shape of its calls.
    """

    layers: dict[ShapeKey, KernelChoice]
    attention: dict[AttentionKey, KernelChoice]


def set_up_kernels(base: nn.Module, *, tell: Callable[[str], None] = lambda line: None) -> int:
    """Let a loaded model use our kernels where they win on this machine, in place.

    Args:
        base: an mlx-lm model, its adapter attached.
        tell: called with a line before a race.

    Returns:
        How many layers use them.

    Raises:
        ValueError: ``MLX_MTP_KERNELS`` asks for something unknown.
    """
    mode = kernel_mode()
    if mode == "stock" or not has_metal():
        return 0
    choices = all_choices(
        base, mode=mode, runner=MetalRunner(), attention=MetalAttention(), tell=tell
    )
    use_attention(base, choices.attention)
    return use_kernels(base, choices.layers)


def choices_for(
    base: nn.Module,
    *,
    mode: Mode,
    runner: Runner,
    tell: Callable[[str], None] = lambda line: None,
    device: Mapping[str, Any] | None = None,
    keep: bool = True,
) -> dict[ShapeKey, KernelChoice]:
    """What multiplies the weights of each shape of a model; arguments as in ``all_choices``."""
    return all_choices(
        base, mode=mode, runner=runner, attention=None, tell=tell, device=device, keep=keep
    ).layers


def all_choices(
    base: nn.Module,
    *,
    mode: Mode,
    runner: Runner,
    attention: AttentionRunner | None,
    tell: Callable[[str], None] = lambda line: None,
    device: Mapping[str, Any] | None = None,
    keep: bool = True,
) -> Choices:
    """What a model uses: from the cache, or decided now.

    Args:
        base: the model.
        mode: from ``kernel_mode``.
        runner: where to check and race what multiplies.
        attention: where to check and race what attends; None leaves attention alone.
        tell: called with a line before a race.
        device: what ``mx.device_info`` says.
        keep: False neither reads nor writes the cache.
    """
    weights = weights_by_shape(base)
    calls = attention_keys(base) if attention else []
    if not weights and not calls:
        return Choices({}, {})
    info = dict(mx.device_info() if device is None else device)
    names = [*(shape_name(key) for key in weights), *(key.name for key in calls)]
    path = cache_dir() / "kernels" / f"{_digest(info, mode, names)}.json"
    found = _read(path, names) if keep else None
    if found is None:
        tell("Choosing kernels for this machine ...")
        generation = gpu_generation(str(info.get("architecture", "")))
        found = _decide(weights, calls, mode, runner, attention, generation)
        if keep:
            _write(path, found)
    return Choices(
        {key: found[shape_name(key)] for key in weights}, {key: found[key.name] for key in calls}
    )


def _decide(
    weights: Mapping[ShapeKey, list[PackedWeight]],
    calls: Sequence[AttentionKey],
    mode: Mode,
    runner: Runner,
    attention: AttentionRunner | None,
    generation: int | None,
) -> dict[str, KernelChoice]:
    """Choices by name, within one deadline; what takes the most time decides first."""
    deadline = time.perf_counter() + RACE_SECONDS

    def left() -> float:
        return deadline - time.perf_counter()

    found = {}
    for key, of_shape in sorted(weights.items(), key=lambda item: -_bytes(item[1])):
        found[shape_name(key)] = choose(
            of_shape, mode=mode, runner=runner, generation=generation, seconds_left=left
        )
    for key in calls:
        assert attention is not None
        found[key.name] = choose_attention(key, mode=mode, runner=attention, seconds_left=left)
    return found


def shape_name(key: ShapeKey) -> str:
    """Such as ``4096x14336 4-bit g64 float16`` (outputs x inputs)."""
    outputs, inputs, bits, group_size, dtype = key
    return f"{outputs}x{inputs} {bits}-bit g{group_size} {str(dtype).removeprefix('mlx.core.')}"


def _bytes(weights: Any) -> int:
    return sum(each.weight.nbytes for each in weights)


def _digest(info: Mapping[str, Any], mode: Mode, names: Sequence[str]) -> str:
    text = hashlib.sha256(kernel_header().encode()).hexdigest()
    everything = [*gpu_marks(info), mode, version("mlx"), text, *sorted(names)]
    return hashlib.sha256("\n".join(everything).encode()).hexdigest()[:24]


def _read(path: Path, names: Sequence[str]) -> dict[str, KernelChoice] | None:
    """The choices of a file, if it is sound and has them all."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: choice_from_dict(values[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, choices: Mapping[str, KernelChoice]) -> None:
    values = {name: choice_to_dict(choice) for name, choice in choices.items()}
    with contextlib.suppress(OSError):  # a cache that cannot be written is raced for again
        write_atomically(path, json.dumps(values, indent=2) + "\n")
