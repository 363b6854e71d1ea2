"""The executor: modes, schedules, what lanes do together, and errors that name the line."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host import Kernel, MslError, from_bfloat16, kernel_text, kernel_texts, to_bfloat16
from tests.metal_host.compiler import build
from tests.metal_host.rewriter import rewrite
from tests.metal_host.signature import read_signature
from tests.metal_host.toolchain import find_clang

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
POSITIONS = """uint gid [[thread_position_in_grid]], uint lid [[thread_index_in_threadgroup]],
  uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]"""


def source(body: str, *, before: str = "", buffers: str = "") -> str:
    """A kernel `k` from x to y; its body starts at line 7."""
    buffers = buffers or "const device float* x [[buffer(0)]], device float* y [[buffer(1)]]"
    return f"{HEAD}{before}\n[[kernel]] void k({buffers},\n  {POSITIONS}) {{\n{body}\n}}\n"


def run(body: str, *, mode: str = "fast", n: int = 64, dtype=np.float32, **options):
    x, y = np.arange(n).astype(dtype), np.zeros(n, dtype)
    kernel = Kernel(source(body), "k", mode=mode)
    report = kernel((n, 1, 1), (min(n, 64), 1, 1), {0: x, 1: y}, uninit=(1,), **options)
    return y, report


@pytest.mark.parametrize("mode", ["fast", "check", "check0", "count"])
def test_every_mode_computes_the_same(mode):
    if mode == "count" and not find_clang():
        pytest.skip("counting needs clang 15 or newer")
    body = """threadgroup float sh[64];
    sh[lid] = x[gid];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[gid] = sh[63 - lid] + simd_sum(1.0f);"""
    y, report = run(body, mode=mode, n=128)
    assert y.tolist() == [(63 - i % 64) + 64 * (i // 64) + 32 for i in range(128)]
    assert (report.threads, report.barriers, report.threadgroup_bytes) == (128, 2, 256)
    assert report.collectives == {"simd_sum": 4}
    assert not report.errors and not report.warnings


@pytest.mark.parametrize("seed", range(4))
def test_a_right_kernel_is_right_in_every_order(seed):
    body = """threadgroup float sh[64];
    float total = 0;
    for (int i = 0; i < 3; i++) {
      sh[lid] = x[gid] + i;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      total += sh[63 - lid];
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    y[gid] = total;"""
    expected = [3 * (63 - i) + 3 for i in range(64)]
    assert run(body, seed=seed)[0].tolist() == expected
    y, report = run(body, mode="check", seed=seed, preempt=True)
    assert y.tolist() == expected and not report.errors


def test_seeds_change_the_order_and_repeat_it():
    body = "atomic_store_explicit((device atomic_uint*)y, lane, memory_order_relaxed);"
    last = [int(run(body, seed=seed)[0].view(np.uint32)[0]) for seed in [0, *range(1, 9), 1]]
    assert last[0] == 31 and last[1] == last[-1] and len(set(last)) > 2


GROUP = {  # expression: lane → value, x being the lane's number
    "simd_max(x[gid])": lambda i: 31,
    "simd_prefix_exclusive_sum(x[gid])": lambda i: i * (i - 1) / 2,
    "simd_prefix_inclusive_sum(x[gid])": lambda i: i * (i + 1) / 2,
    "simd_shuffle_xor(x[gid], 5)": lambda i: i ^ 5,
    "simd_shuffle_down(x[gid], 4)": lambda i: i + 4 if i < 28 else i,
    "simd_shuffle_up(x[gid], 3)": lambda i: i - 3 if i >= 3 else i,
    "simd_shuffle_rotate_down(x[gid], 1)": lambda i: (i + 1) % 32,
    "simd_shuffle_rotate_up(x[gid], 1)": lambda i: (i - 1) % 32,
    "simd_shuffle(x[gid], ushort(31 - lane))": lambda i: 31 - i,
    "simd_shuffle_and_fill_down(x[gid], x[gid] + 100, 1)": lambda i: i + 1 if i < 31 else 100,
    "simd_shuffle_and_fill_up(x[gid], x[gid] + 100, 1, 8)": lambda i: i - 1 if i % 8 else i + 107,
    "simd_broadcast(x[gid], 7)": lambda i: 7,
    "float(simd_is_first())": lambda i: i == 0,
    "float(simd_any(lane == 9))": lambda i: 1,
    "float(simd_all(lane < 31))": lambda i: 0,
    "float(ulong(simd_ballot(lane < 3)))": lambda i: 7,
    "quad_sum(x[gid])": lambda i: 4 * (i // 4 * 4) + 6,
    "quad_broadcast(x[gid], 2)": lambda i: i // 4 * 4 + 2,
    "float(popcount(lane) + clz(uint(1)) + reverse_bits(uchar(1)))": lambda i: i.bit_count() + 159,
    "float(extract_bits(uint(0xabcd), 4, 8))": lambda i: 0xBC,
    "dot(float4(x[gid]), float4(1, 2, 3, 4))": lambda i: 10 * i,
    "float(as_type<uint>(1.0f) >> 23)": lambda i: 127,
    "float(half2(float4(1, x[gid], 2, 3).yz).x)": lambda i: i,
    "select(1.0f, 2.0f, lane > 3)": lambda i: 1 + (i > 3),
    "clamp(x[gid], 3.0f, 9.0f)": lambda i: min(max(i, 3), 9),
    "float(half(x[gid]) + 2048.0h)": lambda i: float(np.float16(i) + np.float16(2048)),
    "float(bfloat(x[gid]) + bfloat(256.0f))": lambda i: round(i / 2) * 2 + 256,
}


def test_functions_of_metal():
    lines = "\n".join(f"y[gid + {32 * n}] = {text};" for n, text in enumerate(GROUP))
    x, y = np.arange(32, dtype=np.float32), np.zeros(32 * len(GROUP), np.float32)
    Kernel(source(lines), "k")((32, 1, 1), (32, 1, 1), {0: x, 1: y})
    for row, (text, expected) in zip(y.reshape(-1, 32), GROUP.items(), strict=True):
        assert row.tolist() == [float(expected(i)) for i in range(32)], text


@pytest.mark.parametrize("dtype", ["float", "half", "bfloat"])
def test_matrices_multiply(dtype):
    body = f"""simdgroup_matrix<{dtype}, 8, 8> a, b;
    simdgroup_matrix<float, 8, 8> c(1.0f);
    simdgroup_load(a, (const device {dtype}*)x, 8);
    simdgroup_load(b, (const device {dtype}*)x, 8, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, y, 8);"""
    values = np.random.default_rng(0).integers(-8, 8, (8, 8)).astype(np.float32)
    held = {"float": values, "half": values.astype(np.float16), "bfloat": to_bfloat16(values)}
    y = np.zeros((8, 8), np.float32)
    kernel = Kernel(source(body), "k", mode="check")
    report = kernel((32, 1, 1), (32, 1, 1), {0: held[dtype], 1: y}, uninit=(1,))
    assert (y == values @ values.T + np.eye(8)).all()
    assert report.matrix_multiplies == 1


def test_the_order_of_a_sum_can_be_changed():
    body = "y[gid] = simd_sum(lane == 0 ? 1e8f : lane == 31 ? -1e8f : 1.0f);"
    sums = {order: run(body, n=32, sum_order=order)[0][0] for order in ("ascending", "butterfly")}
    assert sums["ascending"] != sums["butterfly"]


def test_bfloat16_rounds_as_mlx_does():
    bits = np.random.default_rng(1).integers(0, 2**32, 10000, dtype=np.uint32)
    bits[:4] = 0, 1 << 31, 0x7F800000, 0xFF800000  # zeros and infinities
    values = bits.view(np.float32)
    ours = to_bfloat16(values)
    theirs = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    number = ~np.isnan(values)
    assert (ours[number] == theirs[number]).all()
    assert np.isnan(from_bfloat16(ours[~number])).all() and (~number).any()


def test_an_error_names_its_line_in_both_check_modes():
    for mode in ("check", "check0"):
        with pytest.raises(MslError, match=r"OOB: read .* 'x' \(256 bytes\).* at kernel\.metal:8"):
            run("\ny[gid] = x[gid + 1];", mode=mode)


def test_line_numbers_outlive_the_rewriting():
    body = (
        "threadgroup float\n  a[4],\n  b[64];\nb[lid] = a[0] = 1;\ny[gid] = b[lid];\ny[gid+1] = 0;"
    )
    with pytest.raises(MslError, match=r"OOB: write .* at kernel\.metal:12"):
        run(body, mode="check")


def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(MslError, match="kernel.metal:7.*no_such_name"):
        run("y[gid] = no_such_name;")
    with pytest.raises(MslError, match="kernel nobody not found"):
        Kernel(source("y[gid] = 0;"), "nobody")
    with pytest.raises(ValueError, match="mode must be one of"):
        Kernel(source("y[gid] = 0;"), "k", mode="slow")


def test_a_missing_buffer_is_refused():
    kernel = Kernel(source("y[gid] = n;", buffers="device float* y, constant uint& n"), "k")
    with pytest.raises(MslError, match=r"buffer\(1\) 'n' is not given"):
        kernel((32, 1, 1), (32, 1, 1), {0: np.zeros(32, np.float32)})
    with pytest.raises(TypeError, match="numpy"):
        kernel((32, 1, 1), (32, 1, 1), {0: np.zeros(32, np.float32), 1: 5})  # type: ignore[dict-item]


def test_grids_need_not_be_whole_threadgroups():
    buffers = "device uint* y [[buffer(0)]], uint3 p [[thread_position_in_grid]]"
    buffers += ", uint2 size [[threads_per_threadgroup]]"
    body = "y[p.y * 5 + p.x] = p.x + 10 * p.y + 100 * size.x;"
    text = f"{HEAD}[[kernel]] void k({buffers}) {{ {body} }}"
    y = np.zeros((3, 5), np.uint32)
    Kernel(text, "k", mode="check")((5, 3, 1), (4, 2, 1), {0: y}, uninit=(0,))
    assert y.tolist() == [
        [x + 10 * r + (400 if x < 4 else 100) for x in range(5)] for r in range(3)
    ]


def test_workers_share_the_threadgroups():
    assert (run("y[gid] = 2 * x[gid];", n=4096, workers=3)[0] == 2 * np.arange(4096)).all()


def test_function_constants_and_threadgroup_arguments():
    before = "constant int factor [[function_constant(3)]];"
    buffers = "device float* y [[buffer(0)]], threadgroup float* sh [[threadgroup(0)]]"
    text = source("sh[lid] = factor; y[gid] = sh[lid];", before=before, buffers=buffers)
    kernel, y = Kernel(text, "k", mode="check"), np.zeros(32, np.float32)
    for factor in (3, 5):
        constants = {3: np.int32(factor)}
        report = kernel(
            (32, 1, 1), (32, 1, 1), {0: y}, constants=constants, threadgroup_memory={0: 128}
        )
        assert (y == factor).all() and report.threadgroup_bytes == 128


def test_the_attribute_limits_the_threads():
    text = source("y[gid] = 0;").replace(
        "[[kernel]]", "[[kernel, max_total_threads_per_threadgroup(64)]]"
    )
    with pytest.raises(MslError, match="LIMIT: 128 threads per threadgroup, the limit is 64"):
        Kernel(text, "k")((128, 1, 1), (128, 1, 1), {i: np.zeros(128, np.float32) for i in (0, 1)})


def test_the_cache_keeps_what_differs_apart():
    text = source("y[gid] = VALUE;")
    one, two = (build(text, "k", defines=[f"VALUE={n}"]) for n in (1, 2))
    assert one.library != two.library
    assert build(text, "k", defines=["VALUE=1"]).library == one.library
    assert build(text, "k", defines=["VALUE=1"], mode="check").library != one.library


def test_address_spaces_leave_one_definition():
    text = """struct S {
      float v;
      S(float a) thread : v(a) {}
      float get() const thread { return v; }
      float get() const threadgroup { return v; }
    };
    template <typename T> T first(const device T* p) { return p[0]; }
    template <typename T> T first(const threadgroup T* p) { return p[0]; }
    constant float scale = 2.0;"""
    result = rewrite(text).text
    assert result.count("get()") == 1 and result.count("first(") == 1
    assert "2.0f" in result and result.count("\n") == text.count("\n")


def test_signatures_are_read():
    text = """kernel void f(const device half* a, constant int& n [[buffer(7)]], device int* c,
      uint2 p [[thread_position_in_grid]]) {}"""
    signature = read_signature(text, "f")
    assert [(int(p.kind), p.index) for p in signature.parameters] == [
        (0, 0),
        (0, 7),
        (0, 8),
        (2, 0),
    ]
    assert [p.is_writable for p in signature.parameters[:3]] == [False, False, True]


def test_the_text_comes_from_mlx():
    kernel: Any = mx.fast.metal_kernel(
        name="axpy",
        input_names=["x", "a"],
        output_names=["y"],
        header="template <typename T> T twice(T v) { return v + v; }\n",
        source="uint i = thread_position_in_grid.x; y[i] = N * twice<T>(x[i]) + a[0] + x_shape[0];",
    )

    def call(x: mx.array, a: mx.array) -> mx.array:
        return kernel(
            inputs=[x, a],
            template=[("T", x.dtype), ("N", 3)],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    text = kernel_text(call, mx.zeros(48), mx.zeros(1))
    assert (text.grid, text.threadgroup, text.template_args) == (
        (48, 1, 1),
        (32, 1, 1),
        "<float, 3>",
    )
    x, a, y = (np.array(v, np.float32) for v in (range(48), [7], [0] * 48))
    host = Kernel(text.source, text.name, text.template_args, include=text.include, mode="check")
    host(text.grid, text.threadgroup, text.buffers([x, a], [y]), uninit=(3,))
    assert (y == 6 * x + 7 + 48).all()
    assert len(kernel_texts(lambda x, a: call(call(x, a), a), mx.zeros(48), mx.zeros(1))) == 2
    with pytest.raises(MslError, match="calls 0 Metal kernels"):
        kernel_text(mx.exp, mx.zeros(3))
