"""Folders of the program by environment and platform."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from mlx_mtp.storage.paths import cache_dir, data_dir


@pytest.mark.parametrize(
    ("environment", "platform", "cache", "data"),
    [
        (
            {"MLX_MTP_CACHE": "/a/b", "MLX_MTP_DATA": "/c", "XDG_CACHE_HOME": "/x"},
            Unix, "/a/b", "/c",
        ),
        ({"MLX_MTP_CACHE": "~/b", "MLX_MTP_DATA": "~/d"}, Unix, "/h/b", "/h/d"),
        ({"XDG_CACHE_HOME": "/x", "XDG_DATA_HOME": "/y"}, Unix, "/x/mlx-mtp", "/y/mlx-mtp"),
        ({"XDG_CACHE_HOME": "/x", "XDG_DATA_HOME": "/y"}, MacOS, "/x/mlx-mtp", "/y/mlx-mtp"),
        ({}, Unix, "/h/.cache/mlx-mtp", "/h/.local/share/mlx-mtp"),
        ({}, MacOS, "/h/Library/Caches/mlx-mtp", "/h/Library/Application Support/mlx-mtp"),
    ],
)  # fmt: skip
def test_folders(
    environment: dict[str, str],
    platform: type,
    cache: str,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platformdirs, "PlatformDirs", platform)
    for name in ("MLX_MTP_CACHE", "MLX_MTP_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/h"} | environment).items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(cache)
    assert data_dir() == Path(data)
