"""What every test needs before MLX is imported: few threads, a fast BLAS, the CPU on Linux."""

from __future__ import annotations

import os
import sys
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "2")

# Tests also run programs of this folder as processes of their own, which import from it.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.app.page")  # imported before pytest takes its fixtures

if sys.platform.startswith("linux") and mx.default_device().type != mx.cpu:
    mx.set_default_device(mx.Device(mx.cpu))
