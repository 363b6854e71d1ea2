"""What kernels move and compute, over the least that the problem needs.

    python -m tests.metal_host.count --m 1 4 8 16 --n 128 --k 1024 --bits 4
    python -m tests.metal_host.count --attention --m 1 8 --keys 512

Bytes are those that a perfect cache in each threadgroup would fetch: what a threadgroup loads
counts once, what two load counts twice.  The least: every weight, scale, bias and x once, y once.
Multiply-adds are multiplications, fused or not, and 512 for each 8x8x8 matrix product; the least is
M N K.  `lanes` is the weight's bytes that lanes ask for.  The other columns are instructions of all
lanes for each of these M N K (an estimate: see the README).

Of attention, `keys` are the keys and values, `groups` the threadgroups of the first launch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from . import attention
from .attention import make_attention, measure_attention
from .contenders import CONTENDERS, Contender
from .kernel import Report
from .quantised import Launch, Problem, Shape, make_problem

PARTS = ("weight", "scales", "biases", "x")
COLUMNS = ["bytes", "weight", "x", "lanes", "madds", "float", "convert", "integer", "loads"]
ATTENTION_COLUMNS = ["bytes", "keys", "lanes", "madds", "groups"]
OTHER_FLOAT = ("add", "divide", "compare", "math")


def _bytes(runs: Iterable[tuple[Launch, Report]], role: str, field: str) -> int:
    total = 0
    for launch, report in runs:
        assert report.counts is not None
        for index, name in launch.roles.items():
            if name == role:
                total += getattr(report.counts.buffers[index], field)
    return total


def _instructions(runs: Iterable[tuple[Launch, Report]], *kinds: str) -> int:
    counts = [report.counts.instructions for _, report in runs if report.counts]
    return sum(count.get(kind, 0) for count in counts for kind in kinds)


def least_bytes(problem: Problem) -> dict[str, int]:
    """Bytes of each part when it is moved once."""
    sizes = {part: getattr(problem, part).nbytes for part in PARTS}
    return {**sizes, "y": problem.output().nbytes}


def measure(contender: Contender, problem: Problem) -> dict[str, float]:
    """One row of the table: ratios to the least; `error` relative to float64."""
    runs, y = [], None
    for launch in contender.build(problem):
        y, report = launch.run(mode="count")
        runs.append((launch, report))
    assert y is not None
    least, shape = least_bytes(problem), problem.shape
    products = shape.m * shape.n * shape.k
    moved = {part: _bytes(runs, part, "per_threadgroup") for part in (*PARTS, "other")}
    stored = _bytes(runs, "y", "stored") + _bytes(runs, "other", "stored")
    matrices = 512 * sum(report.matrix_multiplies for _, report in runs)
    return {
        "bytes": (sum(moved.values()) + stored) / sum(least.values()),
        "weight": moved["weight"] / least["weight"],
        "x": moved["x"] / least["x"],
        "lanes": _bytes(runs, "weight", "loaded") / least["weight"],
        "madds": (_instructions(runs, "fma", "multiply") + matrices) / products,
        "float": _instructions(runs, *OTHER_FLOAT) / products,
        "convert": _instructions(runs, "convert") / products,
        "integer": _instructions(runs, "integer") / products,
        "loads": _instructions(runs, "load") / products,
        "barriers": sum(report.barriers for _, report in runs),
        "threadgroup_bytes": max(report.threadgroup_bytes for _, report in runs),
        "error": problem.error(y),
    }


def table(rows: list[dict], columns: Sequence[str] = COLUMNS) -> str:
    """Rows under a heading, aligned."""
    head = f"{'kernel':28} {'M':>3} " + " ".join(f"{name:>8}" for name in columns)
    lines = [
        f"{row['kernel']:28} {row['m']:>3} " + " ".join(f"{row[name]:8.2f}" for name in columns)
        for row in rows
    ]
    return "\n".join([head, *lines])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What kernels move and compute.")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="rows of x")
    parser.add_argument("--n", type=int, default=128, help="rows of the weight")
    parser.add_argument("--k", type=int, default=1024, help="columns of the weight")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--only", default="", help="kernels whose label holds this text")
    parser.add_argument("--attention", action="store_true", help="attention, not matmuls")
    parser.add_argument("--keys", type=int, default=512, help="of the attention")
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="query and key heads")
    parser.add_argument("--head-dim", type=int, default=64)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    rows = _attention_rows(args) if args.attention else _matmul_rows(args)
    print(table(rows, ATTENTION_COLUMNS if args.attention else COLUMNS))
    settings = vars(args) | {"mlx": version("mlx")}
    print(json.dumps({**settings, "rows": rows}))


def _attention_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for m in args.m:
        heads, kv_heads = args.heads
        problem = make_attention(m, args.keys, heads, kv_heads, args.head_dim, args.dtype)
        for label in attention.CONTENDERS:
            # MLX takes sdpa_vector for up to 8 rows and 32 query heads of one key head.
            stock = label.startswith("mlx") and (m > 8 or m * problem.shared_by > 32)
            if args.only in label and not stock:
                rows.append({"kernel": label, "m": m, **measure_attention(label, problem)})
    return rows


def _matmul_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for m in args.m:
        shape = Shape(m, args.n, args.k, args.bits, args.group_size, args.dtype)
        problem = make_problem(shape)
        for contender in CONTENDERS:
            if args.only in contender.label and contender.takes(shape):
                rows.append({"kernel": contender.label, "m": m, **measure(contender, problem)})
    return rows


if __name__ == "__main__":
    main()
