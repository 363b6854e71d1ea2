"""What the kernels take of an NVIDIA GPU, as its compiler tells; nothing is run.

    python -m tests.metal_host.cuda.compile            # 4 bits, groups of 64, half and bfloat16
    python -m tests.metal_host.cuda.compile --all      # a sample of every other format, too

Registers are a thread's; spilled are the bytes of a thread that are stored for want of registers,
stack its bytes in the GPU's own memory, spilled ones among them; shared are the bytes of a block.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version

from mlx_mtp.terminal import Status

from ..our_kernels import text_of
from . import nvrtc
from .build import ARCH, Built, build
from .cases import Case, default_cases, sampled_cases

COLUMNS = ("threads", "registers", "spilled", "stack", "shared")


def build_all(cases: Sequence[Case], *, arch: str = ARCH) -> list[Built]:
    """Compile cases, as many at a time as there are CPUs.

    Raises:
        MslError: one of them does not compile.
    """
    texts = [text_of(case.launch) for case in cases]  # MLX traces in one thread
    with (
        Status("Compiling ...") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        tasks = [pool.submit(build, text, arch=arch) for text in texts]
        for done, _ in enumerate(as_completed(tasks), 1):
            progress.update(f"Compiled {done} of {len(tasks)} kernels")
    return [task.result() for task in tasks]


def row_of(case: Case, built: Built) -> dict:
    """A line of the table."""
    found = asdict(built.resources)
    return {
        "kernel": case.kernel,
        "m": case.rows,
        "threads": built.unit.block[0],
        "registers": found["registers"],
        "spilled": found["spilled_bytes"],
        "stack": found["stack_bytes"],
        "shared": found["shared_bytes"],
    }


def table(rows: Sequence[dict]) -> str:
    """Rows under a heading, aligned."""
    head = f"{'kernel':50} {'M':>3} " + " ".join(f"{name:>9}" for name in COLUMNS)
    lines = [
        f"{row['kernel']:50} {row['m']:>3} " + " ".join(f"{row[name]:>9}" for name in COLUMNS)
        for row in rows
    ]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(description="What the kernels take of an NVIDIA GPU.")
    parser.add_argument("--all", action="store_true", help="other formats, too")
    parser.add_argument("--only", default="", help="kernels whose label holds this text")
    parser.add_argument("--arch", default=ARCH)
    args = parser.parse_args(arguments)
    cases = [*default_cases(), *(sampled_cases() if args.all else ())]
    cases = [case for case in cases if args.only in case.kernel]
    built = build_all(cases, arch=args.arch)
    rows = [row_of(case, each) for case, each in zip(cases, built, strict=True)]
    print(table(rows))
    for case, each in zip(cases, built, strict=True):
        for line in each.warnings:
            print(f"{case.kernel}: {line}")
    settings = {"arch": args.arch, "nvrtc": nvrtc.version(), "mlx": version("mlx")}
    print(json.dumps({**settings, "rows": rows}))


if __name__ == "__main__":
    main()
