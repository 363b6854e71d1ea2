"""Which machine this is, for people and for files that hold only here, and whether it is busy."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

_THREADS = Path("/proc/self/task")


def gpu_info() -> dict[str, Any]:
    """What MLX says of the GPU that models run on; empty on a CPU."""
    return dict(mx.device_info()) if mx.default_device().type == mx.gpu else {}


def machine_name(info: Mapping[str, Any]) -> str:
    """What a person would call it; ``info`` is from ``gpu_info``."""
    return str(info.get("device_name") or platform.processor() or platform.machine())


def gpu_marks(info: Mapping[str, Any]) -> list[str]:
    """What tells one GPU from another."""
    return [str(info.get(name)) for name in ("architecture", "device_name", "memory_size")]


def waited_ms(threads: Path = _THREADS) -> float:
    """How long the threads of this process could have run but waited for a core, so far.

    Linux counts it; elsewhere it is 0.0.
    """
    total = 0
    for file in threads.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that ended
            total += int(file.read_text(encoding="ascii").split()[1])
    return total / 1e6
