"""Facts about the machine for a benchmark: memory, swap, energy.

Values that cannot be read are None, never estimates.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.backends.device import gpu_info, machine_name

POWERCAP = Path("/sys/class/powercap")
_SYSCTL_S = 5.0


def machine() -> dict[str, Any]:
    """Return the facts about this machine; JSON-ready."""
    info = gpu_info()
    return {
        "name": _cpu_name() if not info else machine_name(info),
        "system": f"{os.uname().sysname} {os.uname().machine}",
        "backend": backend(),
        "threads": threads(),
        "memory_bytes": info.get("memory_size") or psutil.virtual_memory().total,
        "recommended_working_set_bytes": info.get("max_recommended_working_set_size"),
        "wired_limit_mb": _sysctl_number("iogpu.wired_limit_mb"),
    }


def backend() -> str:
    """Return the backend, with the BLAS on a CPU."""
    if mx.default_device().type == mx.cpu:
        return f"CPU ({BLAS} BLAS)"
    return "Metal" if mx.metal.is_available() else "CUDA"


def threads() -> int:
    """Return the number of CPU threads: OMP_NUM_THREADS, or the cores of this process."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdecimal() and int(setting):
        return int(setting)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def swap_bytes() -> int | None:
    """Return the swap in use in bytes; None if it cannot be read."""
    try:
        return psutil.swap_memory().used
    except (OSError, RuntimeError):  # /proc/vmstat may be hidden in a container
        return None


class PowerMeter:
    """Measures the energy of the processor with Linux's RAPL counters.

    Only whole packages count; their parts and the platform would be counted twice.

    Attributes:
        reason: reason why energy cannot be read, or "".
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._last: dict[Path, int] = {}
        self._range: dict[Path, int] = {}
        packages = [path for path in sorted(root.glob("intel-rapl:*")) if _is_package(path)]
        for package in packages:
            try:
                self._range[package] = _number(package / "max_energy_range_uj")
                self._last[package] = _number(package / "energy_uj")
            except (OSError, ValueError):
                self._range.pop(package, None)
        self.reason = "" if self._range else _why_no_power(bool(packages))

    def joules(self) -> float | None:
        """Energy of all packages since the last call, or since the creation of the meter.

        Counters that overflow are handled.  None if they cannot be read.
        """
        if not self._range:
            return None
        microjoules = 0
        try:
            for package, span in self._range.items():
                now = _number(package / "energy_uj")
                microjoules += (now - self._last[package]) % (span + 1)
                self._last[package] = now
        except (OSError, ValueError):
            return None
        return microjoules / 1e6


def _is_package(folder: Path) -> bool:
    try:
        return (folder / "name").read_text(encoding="ascii").startswith("package")
    except (OSError, ValueError):
        return False


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _why_no_power(has_counters: bool) -> str:
    if has_counters:
        return "not readable: the energy counters require root"
    if sys.platform == "darwin":
        return "not readable: powermetrics requires root"
    return "not readable: this machine has no energy counters"


def _cpu_name() -> str:
    """Name of the processor."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or machine_name({})
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return machine_name({})
    match = re.search(r"^model name\s*: (.+)$", text, re.M)
    return match[1].strip() if match else machine_name({})


def _sysctl(name: str) -> str | None:
    """Value of a system setting of macOS."""
    if sys.platform != "darwin":
        return None
    try:
        result = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=_SYSCTL_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _sysctl_number(name: str) -> int | None:
    text = _sysctl(name) or ""
    return int(text) if text.isdecimal() else None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference between two machines."""
    return [
        f"{name} {one.get(name)} in A, {other.get(name)} in B"
        for name in ("name", "system", "backend", "threads")
        if one.get(name) != other.get(name)
    ]
