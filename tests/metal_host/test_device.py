"""The kernels on a real Metal GPU; skipped where there is none."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_mtp.backends.metal.matmul import BITS, GROUP_SIZES
from mlx_mtp.backends.metal.operation import check
from mlx_mtp.backends.metal.operations import Matmul
from tests.helpers.kernel_host import random_weight

pytestmark = pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Metal GPU")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_kernels_pass_their_self_check(dtype, bits, group_size):
    packed = random_weight(160, 1152, bits=bits, group_size=group_size, dtype=dtype)
    result = check(Matmul("shape", weights=[packed]))
    assert result.kernels and result.gated, result.problem


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 512), (9, 32), (4096, 4096), (1000, 2080)])
def test_shapes_that_fill_no_tile(outputs, inputs):
    packed = random_weight(outputs, inputs, group_size=32, dtype=mx.float16)
    if packed.is_supported:
        assert check(Matmul("shape", weights=[packed])).kernels
