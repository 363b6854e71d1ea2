"""Every model file of mlx-lm, tried: ``python -m mlx_mtp.lab.models``.

For each family a tiny random model is built (``tiny_models``) and checked (``model_checks``), in a
process of its own with a time limit, so that a crash or a hang is a result too.  ``--json FILE``
keeps the results, one line per family, and a later run continues there.  ``--write-docs`` writes
``docs/models.md`` from them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mlx_lm
import numpy as np

import mlx_mtp.backends.cpu.blas  # noqa: F401  # before mlx: a fast BLAS
from mlx_mtp.lab.model_checks import FAILED, check_family
from mlx_mtp.lab.models_page import page
from mlx_mtp.lab.tiny_models import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TIME_LIMIT = 300.0  # seconds per family
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def sample(count: int, seed: int) -> list[str]:
    """Some families, drawn without repetition, sorted."""
    names = families()
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(names, min(count, len(names)), replace=False).tolist())


def run_families(
    names: Sequence[str], *, jobs: int = 1, time_limit: float = TIME_LIMIT, **options: Any
) -> Iterator[dict[str, Any]]:
    """Check families, each in its own process.

    Args:
        names: the families.
        jobs: processes at a time.
        time_limit: seconds until a family's process is killed.
        options: those of ``check_family``.

    Yields:
        The report of each family, in the order in which they end.
    """
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_child, args=(name, theirs, options))
            process.start()
            theirs.close()
            running[name] = (process, ours, time.monotonic() + time_limit)
        time.sleep(0.02)
        for name, (process, ours, end) in list(running.items()):
            late = time.monotonic() > end
            if not (ours.poll() or late or not process.is_alive()):
                continue
            yield _received(name, ours, late=late, process=process)
            process.kill()
            process.join()
            del running[name]


def _received(name: str, pipe: Any, *, late: bool, process: Any) -> dict[str, Any]:
    if pipe.poll() and not late:
        try:
            return pipe.recv()
        except EOFError:
            process.join(5)
    reason = "no result in time" if late else f"its process ended with {process.exitcode}"
    return {"family": name, "status": FAILED, "reason": reason, "checks": {}, "layers": {}}


def _child(name: str, pipe: Any, options: dict[str, Any]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # mlx-lm prints
    pipe.send(check_family(name, **options).to_dict())


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results of an earlier run by family; those of another mlx-lm are left out."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["family"]: line for line in lines if line["mlx_lm"] == mlx_lm.__version__}


@click.command()
@click.option("--only", "names", multiple=True, help="Family to check; repeatable.")
@click.option("--sample", "count", type=int, help="Number of families to draw.")
@click.option("--seed", default=0, help="Seed of the sample.")
@click.option("--tokens", default=40, help="Tokens per answer.")
@click.option("--long", default=0, help="Tokens of the answer in bfloat16. [default: as others]")
@click.option("-j", "--jobs", default=1, help="Processes at a time.")
@click.option("--write-docs", is_flag=True, help="Write docs/models.md from the results.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="File of results.")
def main(
    names: tuple[str, ...],
    count: int | None,
    seed: int,
    tokens: int,
    long: int,
    jobs: int,
    write_docs: bool,
    path: Path | None,
) -> None:
    """Check every model file of mlx-lm on tiny random models."""
    chosen = list(names) or (sample(count, seed) if count else families())
    results = read_results(path) if path else {}
    left = [name for name in chosen if name not in results]
    for result in run_families(left, jobs=jobs, num_tokens=tokens, num_long=long):
        result |= {"mlx_lm": mlx_lm.__version__, "num_long": long or tokens}
        results[result["family"]] = result
        line = json.dumps(result)
        click.echo(line)
        if path:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    statuses = Counter(results[name]["status"] for name in chosen)
    click.echo(json.dumps({"families": len(chosen), **statuses}))
    if write_docs:
        PAGE.write_text(page({name: results[name] for name in chosen}), encoding="utf-8")
    if statuses[FAILED]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
