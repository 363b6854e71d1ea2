"""Our kernels on an NVIDIA GPU: right or wrong, and what rows cost there.

    python -m tests.metal_host.cuda.run --check
    python -m tests.metal_host.cuda.run --cost --m 1 2 4 8 16 32

Not run on a GPU yet: what can be told without one is tested (test_cuda_run.py).  The
text is that of the Mac, a simdgroup a warp, its 8x8 matrices made of shuffles.  So --check says
whether the kernels are right in real parallel hardware, and --cost what reading the weights once
gains there; of a Mac's matrix units it says nothing.

Exit codes: 0, 1 where something was wrong, 2 where there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from mlx_mtp.storage.files import write_atomically
from mlx_mtp.terminal import Status

from ..errors import MslError
from ..quantised import MLX_TYPES
from . import nvrtc
from .check import all_checks
from .cost import our_costs, random_packed, stock_costs, with_ratios
from .driver import Driver, DriverError, NoDriver
from .gpu import Gpu

WRONG, NO_GPU = 1, 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our kernels on an NVIDIA GPU.")
    parser.add_argument("--check", action="store_true", help="compare with float64, and rows")
    parser.add_argument("--cost", action="store_true", help="time M rows")
    parser.add_argument("--m", type=int, nargs="+", default=list(range(1, 33)), help="rows")
    parser.add_argument("--n", type=int, default=14336, help="outputs of the weight")
    parser.add_argument("--k", type=int, default=4096, help="inputs of the weight")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--dtype", nargs="+", default=["float16", "bfloat16"], choices=sorted(MLX_TYPES)
    )
    parser.add_argument("--output", type=Path, default=Path("cuda.json"), help="a JSON file")
    args = parser.parse_args(arguments)
    if not (args.check or args.cost):
        parser.error("say --check, --cost or both")
    if not all(1 <= m <= 32 for m in args.m):
        parser.error("rows are 1 to 32")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print and write; returns the exit code."""
    args = parse(arguments)
    mx.set_default_device(mx.Device(mx.cpu))  # MLX makes the problems; the GPU is the driver's
    try:
        if nvrtc.library_path() is None:
            raise NoDriver(f"NVRTC is not installed: pip install {nvrtc.WHEEL}")
        gpu = Gpu(Driver())
    except NoDriver as error:
        print(f"Error: {error}", file=sys.stderr)
        return NO_GPU
    found = {"machine": machine(gpu), "settings": {**vars(args), "output": str(args.output)}}
    if args.check:
        found["check"] = checked(gpu)
    if args.cost:
        found["cost"], found["stock"] = timed(gpu, args)
    write_atomically(args.output, json.dumps(found, indent=1) + "\n")
    print(f"Written to {args.output}")
    return 0 if all(each["right"] for each in found.get("check", [])) else WRONG


def machine(gpu: Gpu) -> dict:
    """What was measured on."""
    driver = gpu.driver
    return {
        "gpu": driver.name(),
        "arch": gpu.arch,
        "multiprocessors": driver.attribute("multiprocessors"),
        "l2_bytes": driver.attribute("l2_bytes"),
        "driver_cuda": driver.version(),
        "nvrtc": nvrtc.version(),
        **{name: _version(name) for name in ("mlx", "mlx-cuda-13", "mlx-cuda-12", "mlx-cpu")},
    }


def checked(gpu: Gpu) -> list[dict]:
    """A line for each check."""
    found = []
    with Status("Checking ...") as progress:
        for finding in all_checks(gpu.run):
            progress.update(f"Checked {finding.what}")
            verdict = "right" if finding.right else f"WRONG: {finding.wrong}"
            print(f"{finding.what:66} {finding.error:8.1e}  {verdict}", flush=True)
            found.append(asdict(finding))
    return found


def timed(gpu: Gpu, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Lines of ours and of stock MLX, and what became of stock MLX."""
    rows, stock = [], "not timed: this MLX has no CUDA"
    for name in args.dtype:
        with Status(f"Timing {name} ..."):
            packed = random_packed(
                args.n, args.k, bits=args.bits, group_size=args.group_size, dtype=MLX_TYPES[name]
            )
            ours = list(our_costs(gpu, packed, sorted(set(args.m))))
            rows += ours
            if mx.cuda.is_available():
                try:
                    copies = ours[0]["copies"]
                    rows += stock_costs(packed, sorted(set(args.m)), copies=copies)
                    stock = "timed"
                except (RuntimeError, ValueError) as error:
                    stock = f"not timed: {error}"
    rows = with_ratios(rows)
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f}"
        print(f"{row['kernel']:12} {row['dtype']:9} {row['m']:>3} {row['ms']:9.4f} ms {ratio}")
    print(f"Stock MLX: {stock}")
    return rows, stock


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MslError, DriverError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(WRONG)
