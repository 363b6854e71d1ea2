"""The benchmark of host time: which steps count, and what the busy device computes."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.lab import host_time
from mlx_mtp.lab.tiny_models import with_adapter
from mlx_mtp.model.mtp_model import MTPModel


def test_every_mode_decodes_and_only_full_steps_count() -> None:
    stock, bare, drafting = (host_time.base_model(2, 0) for _ in range(3))
    model = with_adapter(drafting, num_draft_tokens=2)
    modes = host_time.steps_of(stock, MTPModel(bare), model, [1, 2, 3], 9)
    assert tuple(modes) == host_time.MODES
    counts = {name: list(begin()) for name, begin in modes.items()}
    for name in ("stock", "plain", "plain, no adapter"):
        assert counts[name] == [True] * 9
    assert counts["quadratic"][0] is False and any(counts["quadratic"])
    assert 0 < sum(counts["linear"]) < len(counts["linear"])


def test_a_busy_device_changes_no_result() -> None:
    idle, busy = host_time.base_model(1, 0), host_time.base_model(1, 3)
    ids = mx.array([[5, 6, 7]])
    np.testing.assert_allclose(np.array(idle(ids)), np.array(busy(ids)), rtol=1e-6)


def test_steps_are_timed_after_the_first_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10))
    fake = SimpleNamespace(perf_counter=lambda: float(next(clock)), thread_time=lambda: 0.0)
    monkeypatch.setattr(host_time, "time", fake)
    counts = [True] * 7 + [False, True]
    assert host_time.step_times(iter(counts)) == [(1e3, 0.0), (1e3, 0.0)]
