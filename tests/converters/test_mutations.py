"""Thousands of checkpoints with something changed: each is read, or refused with a ValueError.

They are read in worker processes, so that a crash inside MLX is seen and counted, and so is a
hang.  Among them are PyTorch files and one hostile pickle, whose canary must not appear.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlx_mtp.converters.pytorch import sandbox
from tests.converters import mutations

LIMIT_S = 5.0
_STUCK_S = 30.0


@dataclass
class Tally:
    """How the mutations ended: counts by kind and outcome, and the ones that ended badly."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def _read_range(folder: Path, start: int, stop: int, tally: Tally) -> None:
    """Have a worker read these mutations; after a crash or a hang another one goes on behind it."""
    while start < stop:
        worker = subprocess.Popen(
            [sys.executable, mutations.__file__, str(folder), str(start), str(stop)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert worker.stdout is not None
        while select.select([worker.stdout], [], [], _STUCK_S)[0]:
            text = worker.stdout.readline()
            if not text:
                break
            line = json.loads(text)
            kind = mutations.kind_of(line["number"])
            tally.outcomes[kind, line["outcome"]] += 1
            tally.slowest_s = max(tally.slowest_s, line["s"])
            if line["outcome"] not in ("refused", "read", "converted"):
                tally.bad.append(f"{line['number']} ({kind}): {line['outcome']}")
            start = line["number"] + 1
        worker.kill()
        worker.stdout.close()
        code = worker.wait()
        if start < stop:
            tally.bad.append(f"{start}: crashed or hung, exit code {code}")
            start += 1


@pytest.mark.skipif(sandbox.why_unavailable() is not None, reason="there is no sandbox here")
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.soak)])
def test_mutated_checkpoints_are_read_or_refused(
    tmp_path: Path, record_property: Callable[[str, object], None], seed: int, count: int
) -> None:
    mutations.prepare(tmp_path)
    tally = Tally()
    first = seed * 10_000
    middle, last = first + count // 2, first + count
    with ThreadPoolExecutor(2) as pool:
        ranges = [(first, middle), (middle, last)] if count > 200 else [(first, last)]
        jobs = [pool.submit(_read_range, tmp_path, *ends, tally) for ends in ranges]
        for job in jobs:
            job.result()
    summary = {f"{kind} {outcome}": n for (kind, outcome), n in sorted(tally.outcomes.items())}
    record_property("outcomes", summary | {"slowest_s": round(tally.slowest_s, 2)})
    print(summary, f"slowest {tally.slowest_s:.2f} s")
    assert tally.bad == []
    assert sum(tally.outcomes.values()) == count
    assert tally.slowest_s < LIMIT_S
    assert not (tmp_path / "canary").exists()
    # The test would prove little if nothing but refusals, or none, came of it.
    for kind in mutations.KINDS:
        assert tally.outcomes[kind, "refused"] > 0
        survived = tally.outcomes[kind, "read"] + tally.outcomes[kind, "converted"]
        assert (survived > 0) == (kind != "weapon"), kind
