"""Which machine this is, for people and for cached files, and how busy it is."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

_THREADS = Path("/proc/self/task")


def gpu_info() -> dict[str, Any]:
    """MLX's description of the GPU that models run on; empty on a CPU."""
    return dict(mx.device_info()) if mx.default_device().type == mx.gpu else {}


def machine_name(info: Mapping[str, Any]) -> str:
    """The machine's name for people; ``info`` is from ``gpu_info``."""
    return str(info.get("device_name") or platform.processor() or platform.machine())


def gpu_marks(info: Mapping[str, Any]) -> list[str]:
    """Values that identify a GPU."""
    return [str(info.get(name)) for name in ("architecture", "device_name", "memory_size")]


def waited_ms(threads: Path = _THREADS) -> float:
    """Milliseconds that the threads of this process were ready to run but waited for a core.

    Always 0.0 except on Linux.
    """
    total = 0
    for file in threads.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that ended
            total += int(file.read_text(encoding="ascii").split()[1])
    return total / 1e6
