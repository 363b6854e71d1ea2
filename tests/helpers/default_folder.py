"""The default model's folder, written once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mtp.storage.default_model import default_model_path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the default model."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_MTP_CACHE", str(path))
        default_model_path()
    return path


@pytest.fixture
def folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_MTP_CACHE", str(cache))
    return default_model_path()
