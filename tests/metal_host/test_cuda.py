"""The kernels' text for NVIDIA GPUs: it compiles for sm_90, and keeps within a GPU's means.

Nothing is run on a GPU here.  What the library does with lanes is compared on the CPU executor.
"""

from __future__ import annotations

import json
import platform
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host import Kernel, KernelText, MslError
from tests.metal_host.cuda import cases, nvrtc
from tests.metal_host.cuda.build import Built, Resources, build, read_resources
from tests.metal_host.cuda.compile import build_all, main
from tests.metal_host.cuda.translate import ENTRY, CudaUnit, blocks_of, translate
from tests.metal_host.mlx_headers import include_folder, kernel_source
from tests.metal_host.our_kernels import text_of

needs_nvrtc = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"),
    reason="the test extra brings NVRTC on Linux x86-64 alone",
)
MOST_SHARED = 48 << 10  # of a block that asks for no more
# 512 threads have 128 registers each, and more than 8 rows on 16 simdgroups need more of them.  On
# 8 simdgroups one still spills, by the assembler's choice; heads of 256 in float32 need over 255.
# Bounds for NVRTC 13.5: what it said, with room for less than another 128 bytes.
KNOWN_SPILLS = {
    "matrix, 4 bits by 64, half, 16 rows": 128,
    "matrix, 4 bits by 64, half, 24 rows": 128,
    "matrix, 4 bits by 64, half, 32 rows": 128,
    "matrix, 4 bits by 64, bfloat16, 16 rows": 128,
    "matrix, 4 bits by 64, bfloat16, 24 rows": 128,
    "matrix, 4 bits by 64, bfloat16, 32 rows": 1408,
    "matrix, 4 bits by 64, half, 8 simdgroups, 16 rows": 384,
    "matrix gated, 4 bits by 128, float32, 24 rows": 256,
    "matrix, 6 bits by 64, float32, 8 rows": 128,
    "attention spans, heads of 256, all, float32, 6 rows": 64,
}
TEXT = """#include <metal_stdlib>
using namespace metal;
[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
    constant int& n [[buffer(2)]], uint i [[thread_index_in_threadgroup]]) {
  BODY
}
"""
KINDS = {
    "scalar, one row": lambda: cases.matmul(1, dtype=mx.bfloat16),
    "matrix": lambda: cases.matmul(8, dtype=mx.float16, variant="matrix"),
    "gated": lambda: cases.matmul(3, dtype=mx.float16, gated=True),
    "first product of gated weights": lambda: cases.lora_down(3, dtype=mx.bfloat16),
    "attention": lambda: cases.spans(2, dtype=mx.float16, mask=mx.zeros((2, 256), dtype=mx.bool_)),
    "sum over spans": lambda: cases.merge(80, dtype=mx.bfloat16),
    "gated delta": lambda: cases.gated_delta(dtype=mx.bfloat16),
    "ssm": lambda: cases.ssm(dtype=mx.float16),
}


def text_with(body: str, *, threads: int = 32) -> KernelText:
    """A small kernel as MLX would hand it over."""
    return KernelText(
        source=kernel_source() + TEXT.replace("BODY", body),
        name="k",
        template_args="",
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        include=(include_folder(),),
        metadata=((False, False, False),) * 2,
        initialised=False,
    )


def complaints(built: Built, *, known: int = 0) -> list[str]:
    """What speaks against a kernel: it spills, asks for too much, or the compiler warned."""
    found, resources = list(built.warnings), built.resources
    if 0 < resources.spilled_bytes <= known:
        pass
    elif resources.spilled_bytes:
        found.append(f"{resources.spilled_bytes} bytes spilled")
    elif resources.stack_bytes:
        found.append(f"{resources.stack_bytes} bytes of local memory")
    if resources.shared_bytes > MOST_SHARED:
        found.append(f"{resources.shared_bytes} bytes shared")
    if resources.registers * built.unit.block[0] > 65536:
        found.append(f"{resources.registers} registers")
    return found


@needs_nvrtc
class TestGate:
    @pytest.mark.parametrize("kind", KINDS)
    def test_takes_a_kernel_of_each_kind(self, kind):
        built = build(text_of(KINDS[kind]().launch))
        assert complaints(built) == []
        assert built.cubin[:4] == b"\x7fELF" and ENTRY.encode() in built.cubin

    def test_sees_a_syntax_error_and_names_its_line(self):
        with pytest.raises(MslError, match=r'kernel\.metal\(7\).*expected a ";"'):
            build(text_with("\n  y[i] = x[i]"))  # seen at the brace in the line after

    def test_sees_a_local_array(self):
        body = "float a[200]; for (int j = 0; j < 200; j++) a[j] = x[i + j]; y[i] = a[n];"
        built = build(text_with(body))
        assert built.resources.stack_bytes >= 800
        assert complaints(built) == [f"{built.resources.stack_bytes} bytes of local memory"]

    def test_sees_spilled_registers(self):
        """80 sums cannot be in the 64 registers that each of 1024 threads may have."""
        body = """float sums[80];
#pragma clang loop unroll(full)
  for (int j = 0; j < 80; j++) sums[j] = 0.0f;
  for (int k = 0; k < n; k++) {
#pragma clang loop unroll(full)
    for (int j = 0; j < 80; j++) sums[j] = fma(x[k], x[k + j], sums[j]);
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < 80; j++) y[i * 80 + j] = sums[j];"""
        roomy, tight = (build(text_with(body, threads=threads)) for threads in (128, 1024))
        assert complaints(roomy) == []
        assert "bytes spilled" in complaints(tight)[0]

    def test_takes_a_known_spill_alone(self):
        spills = Resources(registers=128, stack_bytes=64, spilled_bytes=64, shared_bytes=0)
        built = Built(CudaUnit("", 1, (1, 1, 1), (512, 1, 1)), b"", spills, ())
        assert complaints(built, known=64) == []
        assert complaints(built, known=63) == complaints(built) == ["64 bytes spilled"]

    def test_sees_too_much_threadgroup_memory(self):
        with pytest.raises(MslError, match="shared"):
            build(text_with("threadgroup float a[16384]; a[i] = x[i]; y[i] = a[i ^ 1];"))

    def test_sees_a_warning(self):
        assert "warning" in complaints(build(text_with("int unused = n; y[i] = x[i];")))[0]

    @pytest.mark.soak
    def test_takes_every_kernel_of_the_default_format(self):
        assert refused(list(cases.default_cases())) == {}

    @pytest.mark.soak
    def test_takes_a_sample_of_every_other_format(self):
        assert refused(list(cases.sampled_cases())) == {}

    def test_the_command_prints_a_table_and_one_line_of_json(self, capsys):
        main(["--only", "attention merge"])
        *lines, last = capsys.readouterr().out.strip().split("\n")
        found = json.loads(last)
        assert len(lines) == 3 and lines[0].split()[:2] == ["kernel", "M"]
        assert found["arch"] == "sm_90" and len(found["rows"]) == 2
        assert all(row["registers"] > 8 and row["spilled"] == 0 for row in found["rows"])


def refused(some: list[cases.Case]) -> dict[str, list[str]]:
    """What is said against kernels, by kernel."""
    all_built = build_all(some)
    names = [f"{case.kernel}, {case.rows} rows" for case in some]
    said = {
        name: complaints(built, known=KNOWN_SPILLS.get(name, 0))
        for name, built in zip(names, all_built, strict=True)
    }
    return {kernel: found for kernel, found in said.items() if found}


class TestTranslation:
    def test_counts_blocks(self):
        assert blocks_of((4096, 3, 2), (128, 1, 1)) == (32, 3, 2)

    @pytest.mark.parametrize(
        ("grid", "threadgroup", "says"),
        [
            ((100, 1, 1), (32, 1, 1), "not whole threadgroups"),
            ((0, 1, 1), (32, 1, 1), "no launch"),
            ((2048, 1, 1), (2048, 1, 1), "no launch"),
        ],
    )
    def test_refuses_grids_that_cuda_does_not_have(self, grid, threadgroup, says):
        with pytest.raises(MslError, match=says):
            blocks_of(grid, threadgroup)

    def test_numbers_buffers_as_mlx_does_and_bounds_the_threads(self):
        case = cases.spans(2, dtype=mx.float16)
        text = text_of(case.launch)
        unit = translate(text)
        names = [each.shape for each in case.launch.inputs.values()]
        buffers = text.buffers([np.zeros(shape) for shape in names], [np.zeros(1)])
        assert unit.buffers == len(buffers)
        assert f"__launch_bounds__({text.threadgroup[0]})" in unit.source
        assert f"void* buffer_{unit.buffers - 1})" in unit.source
        assert f"*static_cast<const float*>(buffer_{_index_of_scale(text)})" in unit.source

    def test_keeps_line_numbers(self):
        unit = translate(text_with('/* one\n two */ y[i] = 0; // it\'s "done"\n y[i] = 1;'))
        lines = unit.source[unit.source.index('"kernel.metal"\n') :].splitlines()[1:]
        assert lines[6].strip() == "y[i] = 1;" and "done" not in unit.source

    def test_refuses_positions_that_it_does_not_know(self):
        text = text_with("y[i] = 0;")
        odd = text.source.replace("thread_index_in_threadgroup", "thread_index_in_quadgroup")
        with pytest.raises(MslError, match="i has no counterpart"):
            translate(KernelText(**{**vars(text), "source": odd}))

    def test_reads_what_the_assembler_says(self):
        log = (
            "ptxas .  96 bytes stack frame, 92 bytes spill stores, 112 bytes spill loads\n"
            "ptxas info : Used 128 registers, used 1 barriers, 96 bytes cumulative stack size, "
            "8192 bytes smem\n"
        )
        wanted = Resources(registers=128, stack_bytes=96, spilled_bytes=92, shared_bytes=8192)
        assert read_resources(log) == wanted
        for wrong in ("", log + log):
            with pytest.raises(MslError, match="not that of one kernel"):
                read_resources(wrong)


def _index_of_scale(text: KernelText) -> int:
    (line,) = (line for line in text.source.splitlines() if "& scale [[buffer(" in line)
    return int(line.split("buffer(")[1].split(")")[0])


# The library for CUDA and the executor's side by side in one kernel on the CPU.
SHIMS = """#include <metal_stdlib>
using namespace metal;
struct shim_triple { uint x, y, z; };
#define threadIdx (shim_triple{msl_rt_builtins()->lane, 0, 0})
#define blockDim (shim_triple{32, 1, 1})
#define __shared__ static
inline uint __shfl_sync(uint, uint x, int lane) { return simd_shuffle(x, ushort(lane)); }
inline bool __any_sync(uint, bool x) { return simd_any(x); }
inline bool __all_sync(uint, bool x) { return simd_all(x); }
inline void __syncthreads() {}
inline void __syncwarp() {}
namespace cuda_side {
"""
LANES = """
}
template <typename T>
[[kernel]] void lanes(const device T* x [[buffer(0)]], device T* ours [[buffer(1)]],
    device T* wanted [[buffer(2)]], uint i [[thread_index_in_threadgroup]]) {
  namespace cuda = cuda_side::metal;
#define BOTH(at, ...) \\
  ours[32 * at + i] = cuda::__VA_ARGS__; wanted[32 * at + i] = ::metal::__VA_ARGS__;
  BOTH(0, simd_sum(x[i]))
  BOTH(1, simd_max(x[i]))
  BOTH(2, simd_min(x[i]))
  BOTH(3, simd_product(x[i]))
  BOTH(4, simd_shuffle(x[i], ushort((i * 7) % 32)))
  BOTH(5, simd_shuffle_xor(x[i], 5))
  BOTH(6, simd_shuffle_up(x[i], 3))
  BOTH(7, simd_shuffle_down(x[i], 9))
  BOTH(8, simd_broadcast(x[i], 11))
}
"""
PRODUCT = """
}
template <typename Matrix>
float2 product(const device float* x, uint i) {
  Matrix a, b, c;
  a.thread_elements() = float2(x[2 * i], x[2 * i + 1]);
  b.thread_elements() = float2(x[64 + 2 * i], x[65 + 2 * i]);
  c.thread_elements() = float2(x[128 + 2 * i], x[129 + 2 * i]);
  simdgroup_multiply_accumulate(c, a, b, c);
  return c.thread_elements();
}
[[kernel]] void products(const device float* x [[buffer(0)]], device float* ours [[buffer(1)]],
    device float* wanted [[buffer(2)]], uint i [[thread_index_in_threadgroup]]) {
  const float2 by_shuffles = product<cuda_side::metal::simdgroup_matrix<float, 8, 8>>(x, i);
  const float2 by_executor = product<::metal::simdgroup_matrix<float, 8, 8>>(x, i);
  ours[2 * i] = by_shuffles.x;
  ours[2 * i + 1] = by_shuffles.y;
  wanted[2 * i] = by_executor.x;
  wanted[2 * i + 1] = by_executor.y;
}
"""


def cuda_library(*names: str) -> str:
    texts = [(nvrtc.INCLUDE / name).read_text() for name in names]
    return "\n".join(text.replace("#pragma once", "") for text in texts)


class TestLibrary:
    @pytest.mark.parametrize("kind", ["float", "half", "int", "uint"])
    def test_does_with_lanes_what_the_executor_does(self, kind):
        types = {"float": np.float32, "half": np.float16, "int": np.int32, "uint": np.uint32}
        values = np.random.default_rng(0).normal(0, 3, 32)
        x = np.abs(values * 2).astype(types[kind]) if kind == "uint" else values.astype(types[kind])
        ours, wanted = (np.zeros(9 * 32, x.dtype) for _ in range(2))
        kernel = Kernel(SHIMS + cuda_library("cuda_simd.h") + LANES, "lanes", f"<{kind}>")
        kernel((32, 1, 1), (32, 1, 1), {0: x, 1: ours, 2: wanted})
        assert wanted.any() and ours.tobytes() == wanted.tobytes()

    def test_multiplies_matrices_to_the_executors_bits(self):
        x = np.random.default_rng(1).normal(size=192).astype(np.float32)
        ours, wanted = (np.zeros(64, np.float32) for _ in range(2))
        library = cuda_library("cuda_simd.h", "cuda_matrix.h")
        Kernel(SHIMS + library + PRODUCT, "products")(
            (32, 1, 1), (32, 1, 1), {0: x, 1: ours, 2: wanted}
        )
        assert wanted.any() and ours.tobytes() == wanted.tobytes()
