"""What every test needs before MLX is imported: few threads, a fast BLAS, the CPU on Linux."""

from __future__ import annotations

import os
import sys

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "2")

from mlx_mtp.blas import preload_openblas  # noqa: E402

preload_openblas()

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("app_page")  # tests import it before pytest takes its fixtures

if sys.platform.startswith("linux") and mx.default_device().type != mx.cpu:
    mx.set_default_device(mx.Device(mx.cpu))
