"""The installed package itself: its version and its folder."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path


@cache
def package_version() -> str:
    """Version of mlx-mtp; ``"0+unknown"`` in a checkout that is not installed."""
    try:
        return version("mlx-mtp")
    except PackageNotFoundError:
        return "0+unknown"


def versions() -> dict[str, str]:
    """Versions of what decides a result: mlx-mtp, mlx, mlx-lm and Python."""
    libraries = {name: version(name) for name in ("mlx", "mlx-lm")}
    return {"mlx-mtp": package_version(), **libraries, "python": platform.python_version()}


def package_folder() -> Path:
    """Folder that holds the package's rooms."""
    return Path(str(files("mlx_mtp"))).resolve()
