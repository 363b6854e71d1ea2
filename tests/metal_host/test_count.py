"""Mode count: bytes exactly, instructions by kind on kernels whose counts are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.metal_host import Kernel, to_bfloat16
from tests.metal_host.contenders import CONTENDERS
from tests.metal_host.count import main, measure
from tests.metal_host.counting import kind_of, size_of
from tests.metal_host.quantised import Shape, make_problem
from tests.metal_host.toolchain import find_clang

pytestmark = pytest.mark.skipif(not find_clang(), reason="counting needs clang 15 or newer")

HEAD = """#include <metal_stdlib>
using namespace metal;
[[kernel]] void k(const device T* x [[buffer(0)]], device float* y [[buffer(1)]],
    const device float* w [[buffer(2)]], constant int& n [[buffer(3)]],
    uint gid [[thread_position_in_grid]], uint lid [[thread_index_in_threadgroup]]) {
"""
THREADS, GROUP, LENGTH = 256, 64, 24


def count(body: str, kind: str = "float"):
    """The report of a launch in which each of 256 threads has 24 elements of x and all of w."""
    x = np.ones(THREADS * LENGTH, np.float32)
    held = {"float": x, "half": x.astype(np.float16), "bfloat": to_bfloat16(x)}[kind]
    y, w = np.zeros(THREADS, np.float32), np.ones(LENGTH, np.float32)
    kernel = Kernel(HEAD + body + "\n}\n", "k", mode="count", defines=[f"T={kind}"])
    report = kernel((THREADS, 1, 1), (GROUP, 1, 1), {0: held, 1: y, 2: w, 3: np.int32(LENGTH)})
    assert report.counts is not None
    return y, report, report.counts


LOOP = """float total = 0;
for (int i = 0; i < n; i++) total = fma(float(x[gid * n + i]), w[i], total);
y[gid] = total;"""


@pytest.mark.parametrize("kind, width", [("float", 4), ("half", 2), ("bfloat", 2)])
def test_a_known_loop(kind, width):
    y, report, counts = count(LOOP, kind)
    steps = THREADS * LENGTH
    assert (y == LENGTH).all()
    assert counts.instructions["fma"] == steps
    assert counts.instructions.get("convert", 0) == (steps if kind != "float" else 0)
    assert counts.instructions["load"] == 2 * steps + THREADS  # and n, once a thread
    assert counts.instructions["store"] == THREADS
    assert steps <= counts.instructions["branch"] <= steps + 2 * THREADS
    x, w, stored = counts.buffers[0], counts.buffers[2], counts.buffers[1].stored
    assert (x.loaded, x.per_threadgroup, x.distinct) == (steps * width,) * 3
    assert (w.loaded, w.per_threadgroup, w.distinct) == (steps * 4, LENGTH * 4 * 4, LENGTH * 4)
    assert stored == THREADS * 4 and report.threads == THREADS


def test_an_expression_contracts_as_on_a_gpu():
    _, _, counts = count("y[gid] = x[gid] * w[0] + 1.0f; y[gid] = y[gid] * 3.0f - w[1] / w[2];")
    kinds = {kind: n / THREADS for kind, n in counts.instructions.items()}
    assert (kinds["fma"], kinds["divide"]) == (2, 1)
    assert "multiply" not in kinds and "add" not in kinds


@pytest.mark.parametrize("kind", ["float", "half", "bfloat"])
def test_a_vector_is_one_load(kind):
    body = """vec<T, 4> v = *(const device vec<T, 4>*)(x + 4 * gid);
    float total = 0;
    for (int i = 0; i < 4; i++) total += float(v[i]);
    float2 pair = ((const device float2*)w)[lid & 3];
    y[gid] = total + pair.x + pair.y;"""
    y, _, counts = count(body, kind)
    assert (y == 6).all()
    assert counts.instructions["load"] == 2 * THREADS
    assert counts.buffers[0].loaded == THREADS * 4 * (4 if kind == "float" else 2)


def test_threadgroup_memory_matrices_and_collectives():
    body = """threadgroup float sh[64];
    sh[lid] = x[gid];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 a, b(1.0f);
    simdgroup_load(a, sh, 8);
    for (int i = 0; i < 5; i++) simdgroup_multiply_accumulate(b, a, a, b);
    y[gid] = simd_sum(b.thread_elements()[0]) + sh[lid];"""
    _, report, counts = count(body)
    simdgroups = THREADS // 32
    assert report.barriers == THREADS // GROUP and report.matrix_multiplies == 5 * simdgroups
    assert report.collectives["simd_sum"] == report.collectives["simdgroup_load"] == simdgroups
    assert counts.threadgroup_stored == 4 * THREADS
    assert counts.threadgroup_loaded == 3 * 4 * THREADS
    # What a matrix product does inside is hardware: nothing of it is among the instructions.
    assert "fma" not in counts.instructions and "multiply" not in counts.instructions
    assert counts.instructions["add"] == THREADS


def test_counts_start_anew_at_each_launch():
    assert count(LOOP)[2] == count(LOOP)[2]


def test_lines_of_llvm():
    assert kind_of("  %4 = tail call float @llvm.fmuladd.f32(float %1, float %2, float %3)") == (
        "fma",
        1,
    )
    assert kind_of("  %5 = fmul <4 x float> %1, %2") == ("multiply", 4)
    assert kind_of("  %6 = fpext half %5 to float") == ("convert", 1)
    assert kind_of("  br i1 %7, label %8, label %9") == ("branch", 1)
    assert kind_of("  br label %8") is None
    assert kind_of("  %8 = call float @_Z1fv()") is None
    assert [size_of(kind) for kind in ("i1", "half", "i32", "ptr", "<4 x float>")] == [
        1,
        2,
        4,
        8,
        16,
    ]


@pytest.mark.slow
def test_how_often_mlx_reads_its_weights():
    """qmv reads them for each row, qmv_wide for each five; a tile of qmm takes 32 rows."""
    weight = {}
    for m in (1, 8):
        problem = make_problem(Shape(m, 64, 512))
        for contender in CONTENDERS:
            if contender.label.startswith("mlx") and contender.takes(problem.shape):
                row = measure(contender, problem)
                weight[contender.label, m] = row["weight"]
                assert row["error"] < 2e-3 and row["madds"] >= 1, contender.label
    assert weight["mlx qmv", 1] == 1 and weight["mlx qmv", 8] == 8
    assert weight["mlx qmv_wide", 8] == 2
    assert weight["mlx qmm", 1] == weight["mlx qmm", 8] == 1


@pytest.mark.slow
def test_the_command_prints_a_table_and_one_line_of_json(capsys):
    main(["--m", "1", "2", "--n", "32", "--k", "512", "--only", "mlx qmv"])
    *lines, last = capsys.readouterr().out.strip().split("\n")
    assert [line[:28].strip() for line in lines] == ["kernel", "mlx qmv", "mlx qmv", "mlx qmv_wide"]
    found = json.loads(last)
    assert (found["n"], found["k"], len(found["rows"])) == (32, 512, 3)


@pytest.mark.slow
def test_how_often_attention_reads_its_keys(capsys):
    """sdpa_vector reads them for each row and head, ours once for all that share them."""
    main(["--attention", "--m", "1", "3", "--keys", "128"])
    rows = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["rows"]
    keys = {(row["kernel"], row["m"]): row["keys"] for row in rows}
    assert keys["mlx sdpa_vector", 1] == 3 and keys["mlx sdpa_vector", 3] > 8
    assert keys["our step attention", 1] == keys["our step attention", 3] == 1
    assert all(row["error"] < 2e-3 and row["madds"] >= 1 for row in rows)
