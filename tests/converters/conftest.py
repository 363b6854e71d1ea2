"""PyTorch files read in forked processes, which start sooner than fresh interpreters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_mtp.converters.pytorch import checkpoint as torch_checkpoint
from tests.converters.torch_zygote import Zygote


@pytest.fixture(scope="package")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture
def forked(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read PyTorch files in forked processes; ``test_torch_checkpoint`` has fresh ones too."""
    monkeypatch.setattr(torch_checkpoint, "run_child", zygote)
