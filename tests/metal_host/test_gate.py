"""The static gate: what Metal forbids is refused, and valid text passes."""

from __future__ import annotations

import pytest

from tests.metal_host import Kernel, MslError
from tests.metal_host.gate import check
from tests.metal_host.mlx_headers import include_folder, quantized_source
from tests.metal_host.toolchain import find_clang

pytestmark = pytest.mark.skipif(not find_clang(), reason="the gate needs clang 15 or newer")

TEXT = """#include <metal_stdlib>
using namespace metal;
BEFORE
[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
    device atomic_uint* c [[buffer(2)]], constant uint& n [[buffer(3)]],
    uint gid [[thread_position_in_grid]], uint lid [[thread_index_in_threadgroup]]) {
  BODY
}
"""
REFUSED = {  # name: (what comes before the kernel, its body, the finding's beginning)
    "pointer without a space": ("float f(const float* p) { return p[0]; }", "y[gid]=0;",
                                "ADDRESS-SPACE: 'p'"),
    "reference without a space": ("void f(float& r) { r = 1; }", "float v; f(v); y[gid]=v;",
                                  "ADDRESS-SPACE: 'r'"),
    "local pointer without a space": ("", "float v = 1; float* p = &v; y[gid]=*p;",
                                      "ADDRESS-SPACE: 'p'"),
    "device pointer to a thread one": ("float f(thread const float* p) { return p[0]; }",
                                       "y[gid]=f(x);", "COMPILE:"),
    "threadgroup pointer to a device one": ("float f(device float* p) { return p[0]; }",
                                            "threadgroup float s[4]; y[gid]=f(s);", "COMPILE:"),
    "write to constant memory": ("", "n = 3; y[gid]=0;", "COMPILE:"),
    "write through const": ("", "x[gid] = 3; y[gid]=0;", "COMPILE:"),
    "member function called in a space that it does not take": (
        "struct S { float v; float get() const thread { return v; } };",
        "threadgroup S s; y[gid]=s.get();", "COMPILE:"),
    "goto": ("", "again: y[gid]=0; if (n == 9) goto again;", "BANNED: 'goto'"),
    "double": ("", "double v = 1; y[gid]=v;", "BANNED: 'double'"),
    "virtual": ("struct S { virtual float f() { return 1; } };", "y[gid]=0;", "BANNED: 'virtual'"),
    "new": ("", "thread float* p = new float; y[gid]=*p;", "BANNED: 'new'"),
    "exceptions": ("", "try { y[gid]=0; } catch (...) {}", "BANNED: 'try'"),
    "C++'s library": ("", "y[gid] = std::min(1, 2);", "BANNED: 'std'"),
    "function pointer": ("float f(float v) { return v; }",
                         "float (*p)(float) = f; y[gid]=p(1);", "COMPILE:"),
    "static local": ("", "static int count = 0; y[gid]=count++;", "GLOBAL: 'count'"),
    "program-scope variable": ("float g;", "y[gid]=g;", "GLOBAL: 'g'"),
    "program-scope variable in a namespace": ("namespace a { int g = 1; }", "y[gid]=a::g;",
                                              "GLOBAL: 'g'"),
    "threadgroup variable in a branch": ("", "if (n) { threadgroup float s[4]; y[gid]=s[0]; }",
                                         "THREADGROUP:"),
    "threadgroup variable in a function": (
        "float f() { threadgroup float s[4]; return s[0]; }", "y[gid]=f();", "THREADGROUP:"),
    "simd_sum of bfloat": ("", "bfloat v = bfloat(x[gid]); y[gid]=float(simd_sum(v));", "COMPILE:"),
    "simd_sum of ulong": ("", "ulong v = gid; y[gid]=simd_sum(v);", "COMPILE:"),
    "matrix of another size": ("", "simdgroup_matrix<float, 4, 4> m; y[gid]=0;", "COMPILE:"),
    "atomics that are not relaxed": (
        "", "atomic_fetch_add_explicit(c, 1u, memory_order_seq_cst); y[gid]=0;", "COMPILE:"),
    "atomic of a short": ("", "device atomic<short>* p = (device atomic<short>*)c; "
                          "atomic_load_explicit(p, memory_order_relaxed); y[gid]=0;", "COMPILE:"),
    "an unknown name": ("", "y[gid] = no_such_name(gid);", "COMPILE:"),
}  # fmt: skip

ALLOWED = {
    "pointers with spaces": (
        "float f(const device float* p, thread float& r) { r += p[0]; return r; }",
        "float v = 0; y[gid]=f(x, v);"),
    "threadgroup variables": (
        "", "threadgroup float s[4], t; s[lid & 3]=1; t=2; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[gid]=s[0]+t;"),
    "member functions": (
        "struct S { float v; S(float a) thread : v(a) {} float get() const thread { return v; } };",
        "S s(2.0f); y[gid]=s.get();"),
    "constants": ("constant float table[2] = {1, 2}; constant int factor [[function_constant(1)]];"
                  "template <int N> struct T { static constant constexpr int size = N; };",
                  "y[gid]=table[gid & 1] * factor + T<3>::size;"),
    "templates": ("template <typename T, int N> T total(const thread T* v) { T s = 0; "
                  "for (int i = 0; i < N; i++) s += v[i]; return s; }",
                  "thread float v[4] = {1, 2, 3, 4}; y[gid]=total<float, 4>(v);"),
    "vectors": ("", "float4 v = *(const device float4*)(x + 4 * gid); half2 h = half2(v.xy); "
                "y[gid]=dot(v, float4(1.0f)) + float(h.x) + float(as_type<uint>(v.w) >> 3);"),
    "bfloat": ("", "bfloat v = bfloat(x[gid]); y[gid]=simd_sum(float(v));"),
    "matrices": ("", "simdgroup_matrix<float, 8, 8> a(1.0f), b; simdgroup_load(b, x, 8); "
                 "simdgroup_multiply_accumulate(a, b, b, a); y[gid]=a.thread_elements()[0];"),
    "atomics": ("", "atomic_fetch_add_explicit(c, 1u, memory_order_relaxed); y[gid]=0;"),
    "deleted functions": ("struct S { S(int) thread = delete; };", "y[gid]=0;"),
    "a copy that nobody wrote": ("struct S { int v; }; int f(S s) { return s.v; }",
                                 "S s{3}; y[gid]=f(s)+f(S{4});"),
    "namespaces": ("namespace a { namespace b { constant int g = 1; } }", "y[gid]=a::b::g;"),
}  # fmt: skip


def findings(before: str, body: str) -> list[str]:
    return check(TEXT.replace("BEFORE", before).replace("BODY", body))


@pytest.mark.parametrize("name", REFUSED)
def test_what_metal_forbids_is_refused(name):
    before, body, beginning = REFUSED[name]
    found = findings(before, body)
    assert any(text.startswith(beginning) for text in found), found
    assert all(" at kernel.metal:" in text for text in found if "COMPILE" not in text), found


@pytest.mark.parametrize("name", ALLOWED)
def test_valid_text_passes(name):
    assert findings(*ALLOWED[name]) == []


def test_findings_name_the_line():
    assert findings("", "y[gid]=0;\n  goto end; end: ;") == ["BANNED: 'goto' at kernel.metal:8"]
    assert findings("", "\n y[gid]=nothing;")[0].endswith("kernel.metal:8")
    assert findings("\nvoid f(thread int& a, int* p) {}", "y[gid]=0;")[0].endswith("kernel.metal:4")


def test_conversions_to_bfloat_must_be_written():
    """The host's bfloat sees to this one."""
    text = TEXT.replace("BEFORE", "").replace("BODY", "bfloat v = x[gid]; y[gid]=float(v);")
    with pytest.raises(MslError, match=r"kernel.metal:7.*bfloat"):
        Kernel(text, "k")


@pytest.mark.slow
def test_mlx_kernels_pass():
    """They are compiled by everybody's Mac; what is found is in MLX's style, not its validity."""
    instances = [
        "affine_qmv_fast<half, 64, 4, false>",
        "affine_qmv<bfloat16_t, 32, 8, false>",
        "affine_qmm_t<float, 64, 4, true, false>",
        "affine_qmm_n<half, 64, 4, false>",
    ]
    found = check(quantized_source(), instantiate=instances, include=[include_folder()])
    assert [text for text in found if not text.startswith("ADDRESS-SPACE")] == []
