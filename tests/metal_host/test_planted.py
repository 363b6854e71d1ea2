"""Planted bugs: each detector sees its bug, and says nothing about the right twin beside it.

A case is one kernel body.  `SEEN` lists bugs with the detector that must report them; `CLEAN` lists
kernels that look alike and are right.  Clean ones also run in random orders, with preemption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from tests.metal_host import Kernel, MslError, Report

TEXT = """#include <metal_stdlib>
using namespace metal;
BEFORE
[[kernel]] void k(
    const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
    device atomic_uint* c [[buffer(2)]], constant uint& n [[buffer(3)]],
    uint gid [[thread_position_in_grid]], uint lid [[thread_index_in_threadgroup]],
    uint sl [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]],
    uint tg [[threadgroup_position_in_grid]]) {
  threadgroup float sh[128];
  BODY
}
"""
THREADS, GROUP = 512, 128
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
ORDER = "memory_order_relaxed"
LOADED = f"atomic_load_explicit(c, {ORDER})"
WAITS = {
    "wait for a store that never comes": f"while ({LOADED} == 0) {{}} y[gid]=1;",
    "wait before a barrier": f"if (lid == 3) while ({LOADED} == 0) {{}}\n {BARRIER} y[gid]=1;",
    "lock that stays closed": f"while (atomic_exchange_explicit(c, 1u, {ORDER})) {{}} y[gid]=1;",
    "wait for a later threadgroup": f"if (tg == 3) atomic_store_explicit(c, 1u, {ORDER});\n"
    f"while ({LOADED} == 0) {{}} y[gid]=1;",
}


@dataclass(frozen=True)
class Case:
    name: str
    body: str
    detector: str = ""
    before: str = ""
    mode: str = "check"


SEEN = [
    Case("no barrier", "sh[lid]=x[gid]; y[gid]=sh[127-lid];", "RACE"),
    Case("barrier of no memory",
         "sh[lid]=x[gid]; threadgroup_barrier(mem_flags::mem_none); y[gid]=sh[127-lid];", "RACE"),
    Case("barrier of the other memory", f"sh[lid]=x[gid]; {DEVICE_BARRIER} y[gid]=sh[127-lid];",
         "RACE"),
    Case("device memory behind a threadgroup barrier",
         f"y[gid]=x[gid]; {BARRIER} y[gid]=y[gid^64]+1;", "RACE"),
    Case("barrier of a simdgroup only", f"sh[lid]=x[gid]; {SIMD_BARRIER} y[gid]=sh[127-lid];",
         "RACE"),
    Case("no barrier within a simdgroup", "sh[lid]=x[gid]; y[gid]=sh[sg*32+31-sl];", "RACE"),
    Case("simd_sum orders no memory",
         "sh[lid]=x[gid]; float s=simd_sum(1.0f); y[gid]=sh[sg*32+31-sl]+s;", "RACE"),
    Case("write after read in a loop",
         f"for(int i=0;i<3;i++) {{ sh[lid]=x[gid]+i; {BARRIER} y[gid]=sh[127-lid]; }}", "RACE"),
    Case("write after read by several simdgroups",
         f"sh[lid]=x[gid]; {BARRIER} float v=sh[64]; if (lid==64) sh[64]=v+1; y[gid]=v;", "RACE"),
    Case("one writer, other values", "if (sl == 0) sh[0]=float(sg); y[gid]=x[gid];", "RACE"),
    Case("threadgroups share an element", "y[lid]=x[gid];", "RACE"),
    Case("a threadgroup reads another's output", "y[gid]=x[gid]; if (tg) y[gid]=y[gid-128]+1;",
         "RACE"),
    Case("the same value", "y[lid]=1.0f;", "SAME-VALUE"),
    Case("counter without atomics", "device uint* p = (device uint*)c; p[0] = p[0] + 1;", "RACE"),
    Case("atomic and plain store", "atomic_fetch_add_explicit(c, 1u, memory_order_relaxed); "
         "if (gid == 7) *(device uint*)c = 0;", "RACE"),
    Case("barrier in divergent flow", f"if (lid < 64) {{ {BARRIER} }} y[gid]=1;",
         "BARRIER-AFTER-EXIT"),
    Case("barrier after an early return",
         f"if (lid == 5) return; sh[lid]=1; {BARRIER} y[gid]=sh[0];",
         "BARRIER-AFTER-EXIT"),
    Case("two different barriers",
         f"if (lid < 64) {{ {BARRIER} }} else {{\n {BARRIER} }} y[gid]=1;",
         "DIVERGENT-BARRIER"),
    Case("simd_sum in divergent flow",
         "float s=0; if (sl < 16) s=simd_sum(x[gid]);\n s += simd_sum(1.0f); y[gid]=s;",
         "DIVERGENT"),
    Case("different trip counts", "float s=0; for (uint i=0;i<sl%3+1;i++) s += simd_sum(x[gid]);\n"
         "s += simd_max(s); y[gid]=s;", "DIVERGENT"),
    Case("barrier meets a simdgroup operation",
         f"float s=0; if (lid == 0) s=simd_sum(1.0f);\n {BARRIER} y[gid]=s;", "DIVERGENT"),
    Case("lane skips one iteration",
         "float s=0; for (int i=0;i<3;i++) if (sl || i) s += simd_sum(x[gid]); y[gid]=s;",
         "PARTIAL"),
    Case("some lanes returned", "if (sl >= 16) return; y[gid]=simd_sum(x[gid]);", "PARTIAL"),
    Case("shuffle from a lane that returned",
         "if (sl >= 16) return; y[gid]=simd_shuffle_xor(x[gid], 16);", "INACTIVE-LANE"),
    Case("fill from a lane that returned",
         "if (sl >= 16) return; y[gid]=simd_shuffle_and_fill_down(x[gid], 0.0f, 1);",
         "INACTIVE-LANE"),
    Case("lane number out of range", "y[gid]=simd_shuffle(x[gid], 40);", "INACTIVE-LANE"),
    Case("broadcast from different lanes", "y[gid]=simd_broadcast(x[gid], sl/2);", "NONUNIFORM"),
    Case("matrix without all lanes", "if (sl == 0) return; simdgroup_float8x8 a(1.0f), b(2.0f);"
         "simdgroup_multiply(a,a,b); y[gid]=a.thread_elements()[0];", "INACTIVE-LANE"),
    Case("read past a buffer", "y[gid]=x[gid+1];", "OOB"),
    Case("negative index", "y[gid]=x[(int)gid-1];", "OOB"),
    Case("write past a buffer", "y[gid + (gid == n-1)]=1;", "OOB"),
    Case("vector across the end", "y[gid]=((device const packed_float4*)(x + gid))[0][3];", "OOB"),
    Case("write through a const pointer", "((device float*)x)[gid]=1; y[gid]=0;", "RO-WRITE"),
    Case("threadgroup array overrun", "sh[lid+1]=0;", "BOUNDS"),
    Case("threadgroup overrun through a pointer", "threadgroup float* p = sh; p[lid+1]=0;", "OOB"),
    Case("private pointer of another thread", "threadgroup ulong ptr; thread float v[2]; "
         f"v[lid&1]=x[gid]; if (lid==0) ptr=(ulong)(thread float*)v; {BARRIER} "
         "y[gid]=*(thread float*)ptr;", "OOB"),
    Case("uninitialised threadgroup memory", f"if (lid) sh[lid]=1; {BARRIER} y[gid]=sh[127-lid];",
         "UNINIT"),
    Case("threadgroup memory of the threadgroup before",
         f"if (tg == 0) sh[lid]=1; {BARRIER} y[gid]=sh[127-lid];", "UNINIT"),
    Case("uninitialised output", "y[gid]+=x[gid];", "UNINIT"),
    Case("a load that an optimiser drops", "float v=x[gid+1]; y[gid]=1;", "OOB", mode="check0"),
    Case("private array overrun", "thread float v[4]; for (uint i=0;i<=n/128;i++) v[i]=x[gid]; "
         "y[gid]=v[lid&3];", "BOUNDS"),
    Case("misaligned vector", "device const float4* p = (device const float4*)(x + (gid & 1)); "
         "y[gid] = gid < 500 ? p[0].x : 0;", "ALIGN"),
    Case("division by zero", "y[gid]=float(gid / (lid & n));", "DIV"),
    Case("recursion", "y[gid]=f(int(gid)&7);", "RECURSION",
         before="int f(int n) { return n < 2 ? n : f(n-1) + f(n-2); }"),
    Case("recursion through another", "y[gid]=f(int(gid)&7);", "RECURSION",
         before="int g(int n); int f(int n) { return n < 2 ? n : g(n-1); }\n"
         "int g(int n) { return f(n-1) + f(n-2); }"),
    Case("static counter", "static int cnt = 0; y[gid]=cnt++;", "GLOBAL-WRITE"),
    Case("program-scope variable", "g = x[gid]; y[gid]=g;", "GLOBAL-WRITE", before="float g;"),
    *(Case(f"{name}, mode {mode}", body, "WAIT", mode=mode)
      for name, body in WAITS.items() for mode in ("check", "fast")),
    Case("wait without atomics", "while (*(volatile device uint*)c == 0) {} y[gid]=1;", "WAIT"),
    Case("too much threadgroup memory",
         "threadgroup float big[8200]; big[lid]=x[gid]; y[gid]=big[lid];", "TGMEM"),
]  # fmt: skip

CLEAN = [
    Case("reversal", f"sh[lid]=x[gid]; {BARRIER} y[gid]=sh[127-lid];"),
    Case("reversal with both flags",
         "sh[lid]=x[gid]; threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);"
         "y[gid]=sh[127-lid];"),
    Case("reversal in device memory", f"y[gid]=x[gid]; {DEVICE_BARRIER} float v=y[gid^64]; "
         f"{DEVICE_BARRIER} y[gid]=v;"),
    Case("reversal in a simdgroup", f"sh[lid]=x[gid]; {SIMD_BARRIER} y[gid]=sh[sg*32+31-sl];"),
    Case("reversal in a loop", f"for(int i=0;i<3;i++) {{ sh[lid]=x[gid]+i; {BARRIER} "
         f"y[gid]=sh[127-lid]; {BARRIER} }}"),
    Case("one writer", f"if (lid == 0) sh[0]=1; {BARRIER} y[gid]=sh[0];"),
    Case("a whole simdgroup returns", "if (sg == 3) return; y[gid]=simd_sum(x[gid]);"),
    Case("uniform branches", "if (sg & 1) y[gid]=simd_sum(x[gid]); else y[gid]=simd_max(x[gid]);"),
    Case("uniform trip counts",
         "float s=0; for (uint i=0;i<=sg;i++) s += simd_sum(x[gid]); y[gid]=s;"),
    Case("matrix with all lanes", "simdgroup_float8x8 a(1.0f), b(2.0f); simdgroup_multiply(a,a,b); "
         "y[gid]=a.thread_elements()[0];"),
    Case("atomics", "atomic_fetch_add_explicit(c, 1u, memory_order_relaxed); y[gid]=0;"),
    Case("atomics in threadgroup memory", "threadgroup atomic_uint t; if (lid == 0) "
         f"atomic_store_explicit(&t, 0u, memory_order_relaxed); {BARRIER} "
         f"atomic_fetch_add_explicit(&t, 1u, memory_order_relaxed); {BARRIER} "
         "y[gid]=float(atomic_load_explicit(&t, memory_order_relaxed));"),
    Case("wait for another simdgroup", f"if (lid == 127) atomic_store_explicit(c, 1u, {ORDER});\n"
         f"while ({LOADED} == 0) {{}} y[gid]=1;"),
    Case("lock that is opened", f"while (atomic_exchange_explicit(c, 1u, {ORDER})) {{}} y[gid]=1;"
         f"atomic_store_explicit(c, 0u, {ORDER});"),
    Case("guarded load", "y[gid]=gid + 1 < n ? x[gid+1] : 0;"),
    Case("aligned vector",
         "device const float4* p = (device const float4*)x; y[gid]=p[gid/4][gid%4];"),
    Case("the last element", "y[n-1-gid]=x[n-1-gid];"),
    Case("private array",
         "thread float v[4]; for (uint i=0;i<4;i++) v[i]=x[gid]; y[gid]=v[lid&3];"),
    Case("output written, then read", "y[gid]=x[gid]; y[gid]+=1;"),
    Case("division", "y[gid]=float(gid / (lid | 1));"),
    Case("calls without recursion", "y[gid]=f(int(gid)) + f(1);",
         before="int g(int n) { return n + 1; }\nint f(int n) { return g(n) + g(n+1); }"),
    Case("program-scope constant", "y[gid]=table[lid&3];",
         before="constant float table[4] = {1, 2, 3, 4};"),
    Case("all the threadgroup memory that there is",
         "threadgroup float big[8064]; big[lid]=x[gid]; sh[lid]=0; y[gid]=big[lid]+sh[lid];"),
]  # fmt: skip


def launch(case: Case, **options) -> Report:
    text = TEXT.replace("BEFORE", case.before).replace("BODY", case.body)
    x, y = np.arange(THREADS, dtype=np.float32), np.zeros(THREADS, np.float32)
    buffers = {0: x, 1: y, 2: np.zeros(1, np.uint32), 3: np.uint32(THREADS)}
    kernel = Kernel(text, "k", mode=case.mode)
    return kernel(
        (THREADS, 1, 1), (GROUP, 1, 1), buffers, uninit=(1,), raise_on_error=False, **options
    )


@pytest.mark.parametrize("case", SEEN, ids=lambda case: case.name)
def test_the_bug_is_seen(case):
    try:
        report = launch(case)
    except MslError as error:
        assert str(error).startswith(case.detector)
        return
    found = report.errors + report.warnings
    assert any(text.startswith(case.detector) for text in found), found


@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.name)
def test_nothing_is_said_of_the_right_twin(case):
    for options in ({}, {"seed": 3}, {"seed": 4, "preempt": True}):
        report = launch(case, **options)
        assert not report.errors and not report.warnings, options


def test_a_bug_stays_seen_in_every_order():
    for seed in range(1, 6):
        for preempt in (False, True):
            report = launch(SEEN[0], seed=seed, preempt=preempt)
            assert any(text.startswith("RACE") for text in report.errors)


def test_a_wait_is_reported_with_its_threads_line_and_place():
    errors = launch(Case("", WAITS["wait before a barrier"])).errors
    assert len(errors) == 2
    what = r"WAIT: 1 of 128 threads wait .* for byte 0 of buffer\(2\) 'c' .*thread \(3,0,0\)"
    assert re.match(what + ".* at kernel.metal:11", errors[0])
    assert re.match("WAIT: 127 .* in threadgroup_barrier at kernel.metal:12", errors[1])


def test_too_many_threads_are_refused():
    case = Case("", "y[gid]=1;")
    text = TEXT.replace("BEFORE", "").replace("BODY", case.body)
    arrays = {0: np.zeros(2048, np.float32), 1: np.zeros(2048, np.float32)}
    buffers = {**arrays, 2: np.zeros(1, np.uint32), 3: np.uint32(1)}
    with pytest.raises(MslError, match="LIMIT: 2048 threads"):
        Kernel(text, "k", mode="check")((2048, 1, 1), (2048, 1, 1), buffers)


def test_every_detector_is_planted():
    detectors = {case.detector for case in SEEN}
    assert detectors >= {
        *("RACE", "SAME-VALUE", "UNINIT", "OOB", "RO-WRITE", "BOUNDS", "ALIGN", "DIV"),
        *("DIVERGENT", "DIVERGENT-BARRIER", "BARRIER-AFTER-EXIT", "PARTIAL", "INACTIVE-LANE"),
        *("NONUNIFORM", "RECURSION", "GLOBAL-WRITE", "TGMEM", "WAIT"),
    }
