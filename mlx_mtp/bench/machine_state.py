"""What the machine says of itself around a benchmark: memory, swap, energy.

What cannot be read is None, never a guess.
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
    """Which machine this is and what it has; JSON-ready."""
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
    """What models run on here, with the BLAS on a CPU."""
    if mx.default_device().type == mx.cpu:
        return f"CPU ({BLAS} BLAS)"
    return "Metal" if mx.metal.is_available() else "CUDA"


def threads() -> int:
    """Threads that the CPU side may use: what OMP_NUM_THREADS says, or the cores it may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def swap_bytes() -> int | None:
    """Swap in use; None where the system does not say."""
    try:
        return psutil.swap_memory().used
    except (OSError, RuntimeError):  # /proc/vmstat may be hidden in a container
        return None


class PowerMeter:
    """Energy of the processor, from Linux's RAPL counters.

    Only whole packages count: their parts, and the platform around them, would count twice.

    Attributes:
        reason: why it cannot be read, or "".
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._last: dict[Path, int] = {}
        self._range: dict[Path, int] = {}
        packages = [each for each in sorted(root.glob("intel-rapl:*")) if _is_package(each)]
        for package in packages:
            try:
                self._range[package] = _number(package / "max_energy_range_uj")
                self._last[package] = _number(package / "energy_uj")
            except (OSError, ValueError):
                self._range.pop(package, None)
        self.reason = "" if self._range else _why_no_power(bool(packages))

    def joules(self) -> float | None:
        """Energy since the last call, or since it was made; counters that start over are known.

        All packages together; None where it cannot be read.
        """
        if not self._range:
            return None
        taken = 0
        try:
            for package, span in self._range.items():
                now = _number(package / "energy_uj")
                taken += (now - self._last[package]) % (span + 1)
                self._last[package] = now
        except (OSError, ValueError):
            return None
        return taken / 1e6


def _is_package(folder: Path) -> bool:
    try:
        return (folder / "name").read_text(encoding="ascii").startswith("package")
    except (OSError, ValueError):
        return False


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _why_no_power(there: bool) -> str:
    if there:
        return "not readable: the energy counters are for root"
    if sys.platform == "darwin":
        return "not readable: powermetrics is for root"
    return "not readable: this machine shows no energy counters"


def _cpu_name() -> str:
    """What the processor is called."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or machine_name({})
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return machine_name({})
    found = re.search(r"^model name\s*: (.+)$", text, re.M)
    return found[1].strip() if found else machine_name({})


def _sysctl(name: str) -> str | None:
    """What macOS says of a name."""
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=_SYSCTL_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _sysctl_number(name: str) -> int | None:
    text = _sysctl(name) or ""
    return int(text) if text.isdecimal() else None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two machines differ in, as lines."""
    return [
        f"{name} {one.get(name)} in A, {other.get(name)} in B"
        for name in ("name", "system", "backend", "threads")
        if one.get(name) != other.get(name)
    ]
