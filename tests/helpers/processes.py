"""A process that imports once and then forks a child for every task, to save the imports.

The process itself must not compute with MLX: a fork of a process in which MLX has computed hangs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

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
    """

    def __init__(
        self,
        source: str,
        arguments: Sequence[str] = (),
        *,
        flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", source + _LOOP, *arguments],
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

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
