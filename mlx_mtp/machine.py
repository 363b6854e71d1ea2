"""Which machine this is: for people, and for files that hold only here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import mlx.core as mx


def gpu_info() -> dict[str, Any]:
    """What MLX says of the GPU that models run on; empty on a CPU."""
    return dict(mx.device_info()) if mx.default_device().type == mx.gpu else {}


def machine_name(info: Mapping[str, Any]) -> str:
    """What a person would call it; ``info`` is from ``gpu_info``."""
    return str(info.get("device_name") or platform.processor() or platform.machine())


def gpu_marks(info: Mapping[str, Any]) -> list[str]:
    """What tells one GPU from another."""
    return [str(info.get(name)) for name in ("architecture", "device_name", "memory_size")]
