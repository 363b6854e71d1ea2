"""The installed package itself: its version and its folder."""

from __future__ import annotations

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


def package_folder() -> Path:
    """Folder that holds the package's rooms."""
    return Path(str(files("mlx_mtp"))).resolve()
