"""Report what the Metal GPU of this machine can do, for the workflow.

GitHub's macOS runners have a paravirtual GPU that may lack simdgroup matrices. Each capability is
tried in a child process, because a missing one can abort MLX. Prints one line per capability, and
a warning that the workflow shows for each missing one; writes ``NAME=true|false`` to
``$GITHUB_OUTPUT``.
"""

from __future__ import annotations

import os
import subprocess
import sys

DEVICE = """
import mlx.core as mx
assert mx.metal.is_available() and mx.default_device().type == mx.gpu
print(mx.device_info())
"""
CUSTOM_KERNEL = """
import mlx.core as mx
kernel = mx.fast.metal_kernel(
    name="probe_add", input_names=["x"], output_names=["y"],
    source="y[thread_position_in_grid.x] = simd_sum(x[thread_position_in_grid.x]);",
)
(y,) = kernel(
    inputs=[mx.arange(32, dtype=mx.float32)], grid=(32, 1, 1), threadgroup=(32, 1, 1),
    output_shapes=[(32,)], output_dtypes=[mx.float32],
)
assert y.tolist() == [496.0] * 32, y
"""
SIMDGROUP_MATRIX = """
import mlx.core as mx
kernel = mx.fast.metal_kernel(
    name="probe_matrix", input_names=["a", "b"], output_names=["c"],
    header="#include <metal_simdgroup_matrix>\\n",
    source='''
    metal::simdgroup_float8x8 x, y, z = metal::make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    metal::simdgroup_load(x, a, 8);
    metal::simdgroup_load(y, b, 8);
    metal::simdgroup_multiply_accumulate(z, x, y, z);
    metal::simdgroup_store(z, c, 8);
    ''',
)
a = mx.arange(64, dtype=mx.float32).reshape(8, 8)
(c,) = kernel(
    inputs=[a, mx.eye(8)], grid=(32, 1, 1), threadgroup=(32, 1, 1),
    output_shapes=[(8, 8)], output_dtypes=[mx.float32],
)
assert (c == a).all().item(), c
"""
PROBES = {"gpu": DEVICE, "custom_kernel": CUSTOM_KERNEL, "simdgroup_matrix": SIMDGROUP_MATRIX}


def main() -> None:
    """Try every capability and report it."""
    results = {}
    for name, code in PROBES.items():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        results[name] = done.returncode == 0
        lines = (done.stdout if results[name] else done.stderr).strip().splitlines()
        detail = lines[-1] if lines else f"exit code {done.returncode}"
        print(f"{name}: {'yes' if results[name] else 'no'} ({detail})")
        if not results[name]:
            print(f"::warning title=No {name} on this runner::Kernel tests are skipped: {detail}")
    if output := os.environ.get("GITHUB_OUTPUT"):
        with open(output, "a", encoding="utf-8") as file:
            file.writelines(f"{name}={str(value).lower()}\n" for name, value in results.items())


if __name__ == "__main__":
    main()
