"""A process that imports once and then forks a child for every task, to save the imports.

The process itself must not compute with MLX: a fork of a process in which MLX has computed hangs.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # transformers would import it for a second
"""
_LOOP = """
import os, sys, traceback
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            work(line.rstrip("\\n"))
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class ForkServer:
    """Runs tasks one after the other, each in a fork.

    Args:
        source: Python text that defines ``work(task: str)``.
        arguments: ``sys.argv[1:]`` of the process.
        flags: options of the interpreter.
        env: environment variables; the present ones by default.
        torch: whether tasks need PyTorch.
    """

    def __init__(
        self,
        source: str,
        arguments: Sequence[str] = (),
        *,
        flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
        torch: bool = False,
    ) -> None:
        program = ("" if torch else _WITHOUT_TORCH) + source + _LOOP
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=env,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        assert self._stdout.readline() == b"ready\n"

    def run(self, task: str = "", *, kill_after_s: float | None = None) -> int:
        """Run a task, and kill it if it takes longer.

        Returns:
            The exit code; 3 after an exception, -9 if it was killed.
        """
        self._stdin.write(f"{task}\n".encode())
        pid = int(self._stdout.readline())
        if kill_after_s is not None and not select.select([self._stdout], [], [], kill_after_s)[0]:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(int(self._stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def outcome_despite_kills(
    server: ForkServer,
    folder: Path,
    outcome: Callable[[Path], Any],
    *,
    seed: int,
    min_kills: int,
    longest: float,
) -> Any:
    """Kill runs at random moments, resume them, and compare each with one that is left alone.

    Args:
        server: its task is the folder of a run, which is begun or resumed.
        folder: of the folders of all runs.
        outcome: what a finished run leaves, for comparison.
        seed: of the moments.
        min_kills: number of kills after which the last run is finished.
        longest: time to a kill at most, as a fraction of an undisturbed run.

    Returns:
        The outcome of the undisturbed run.
    """
    rng = random.Random(seed)
    assert server.run(str(folder / "first")) == 0  # warms up
    started = time.perf_counter()
    assert server.run(str(folder / "whole")) == 0
    seconds = time.perf_counter() - started
    whole = outcome(folder / "whole")
    assert outcome(folder / "first") == whole
    kills = runs = 0
    while kills < min_kills:
        output = folder / f"run-{runs}"
        while code := server.run(str(output), kill_after_s=rng.uniform(0, longest * seconds)):
            assert code == -signal.SIGKILL
            kills += 1
        assert outcome(output) == whole, f"run {runs} after {kills} kills"
        runs += 1
    return whole
