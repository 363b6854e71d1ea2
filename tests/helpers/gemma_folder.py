"""Gemma 3 270M from its data wheels, converted once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mtp.loading import resolve
from mlx_mtp.storage.data_wheels import GEMMA3_270M


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_MTP_CACHE", str(tmp_path_factory.mktemp("gemma")))
        return resolve(GEMMA3_270M.name, kind="model")
