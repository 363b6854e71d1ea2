"""Processes that compute part of each step's gradient, for MLX's CPU backend.

Matrix products use all cores, everything else in MLX's CPU backend uses one.  With one process per
core, each with its own copy of the model, the sequences of a step are divided among them:
parameters go to the workers and gradients come back through shared memory.  The division depends on
the cost of the sequences, and sums are taken in the order of the workers, so the result depends on
the number of workers but not on their speed.

A process that waits in ``mx.distributed`` (ring) keeps a core busy that the others need, see
``docs/log.md``.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.cpu.blas import BLAS, LIBRARY
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.train.settings import TrainSettings

_THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker loads.

    Attributes:
        model: argument of ``loading.load``.
        trust_remote_code: argument of ``loading.load``.
        start: adapter folder that the run started from, see ``adapter.new_adapter``.
        settings: of the run.
    """

    model: str | None
    trust_remote_code: bool = False
    start: Path | None = None
    settings: TrainSettings


class SharedParameters:
    """Parameters by name as one float32 array that processes can share."""

    def __init__(self, like: Mapping[str, mx.array]) -> None:
        self.shapes = {name: value.shape for name, value in like.items()}
        self.size = sum(value.size for value in like.values())

    def write(self, parameters: Mapping[str, mx.array], numbers: np.ndarray) -> None:
        """Copy parameters into ``numbers``, float32 ``[size]``."""
        start = 0
        for name in self.shapes:
            value = parameters[name]
            numbers[start : start + value.size] = np.array(value, copy=False).reshape(-1)
            start += value.size

    def read(self, numbers: np.ndarray) -> dict[str, mx.array]:
        """Return parameters with copies of ``numbers``."""
        parameters, start = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            parameters[name] = mx.array(numbers[start : start + size].reshape(shape))
            start += size
        return parameters


class Workers:
    """Worker processes that compute gradients; use it as a context.

    Args:
        spec: what they load.
        sequences: all training sequences.
        count: number of processes, including this one.
        like: the parameters, for their shapes.

    Raises:
        ValueError: a worker exited; the message has the reason.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        sequences: Sequence[TokenSequence],
        *,
        count: int,
        like: Mapping[str, mx.array],
    ) -> None:
        self.count = count
        self._layout = SharedParameters(like)
        self._workers: list[tuple[Any, Connection]] = []
        context = multiprocessing.get_context("spawn")
        # In an unlinked file, in memory if there is room, so that no kill leaves it on a disk.
        memory: Any = context.RawArray(ctypes.c_float, count * self._layout.size)
        self._memory = np.frombuffer(memory, dtype=np.float32).reshape(count, -1)
        try:
            with _environment(_THREADS, "1"), _sigint_blocked():
                for index in range(1, count):
                    ours, theirs = context.Pipe()
                    job = (spec, list(sequences), memory, index, theirs)
                    process = context.Process(target=_work, args=job, daemon=True)
                    process.start()
                    self._workers.append((process, ours))
                    theirs.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(
        self,
        parameters: Mapping[str, mx.array],
        chosen: Sequence[int],
        shared: Sequence[Sequence[int]],
        *,
        step: int,
        total: int,
    ) -> None:
        """Start a training step in the workers.

        Args:
            parameters: the trainable parameters.
            chosen: indices of the step's sequences.
            shared: positions in ``chosen`` for each process, from ``step.shares``; the first is for
                this process.
            step: number of the step.
            total: mask rows of the whole step.
        """
        self._layout.write(parameters, self._memory[0])
        for (_, connection), part in zip(self._workers, shared[1:], strict=True):
            with contextlib.suppress(OSError):  # ``collect`` reports why it exited
                connection.send((step, total, [(place, chosen[place]) for place in part]))

    def collect(self) -> Iterator[tuple[Any, float, dict[str, float]]]:
        """Wait for the workers; yield gradients, loss and terms of those that had sequences."""
        for (process, connection), gradients in zip(self._workers, self._memory[1:], strict=True):
            try:
                reply = connection.recv()
            except (EOFError, OSError):
                process.join(5)
                raise ValueError(
                    f"a training worker ended (exit code {process.exitcode})"
                ) from None
            if isinstance(reply, str):
                raise ValueError(f"a training worker failed: {reply}")
            if reply is not None:
                yield self._layout.read(gradients), *reply

    def close(self) -> None:
        """Terminate the workers; may be called twice."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join()
        self._workers = []


def worker_count(num_workers: int, *, batch_size: int) -> int:
    """Number of processes: the setting, or for 0 one per core on a Linux CPU and otherwise one.

    At most one per sequence of a step.
    """
    if num_workers == 0:
        is_linux_cpu = mx.default_device().type == mx.cpu and sys.platform.startswith("linux")
        num_workers = len(os.sched_getaffinity(0)) if is_linux_cpu else 1
    return max(1, min(num_workers, batch_size))


@contextlib.contextmanager
def one_blas_thread(needed: bool) -> Iterator[None]:
    """Limit OpenBLAS to one thread, because the other cores run workers."""
    library: Any = ctypes.CDLL(LIBRARY) if needed and BLAS == "openblas" else None
    before = library.openblas_get_num_threads() if library else 0
    if library:
        library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        if library:
            library.openblas_set_num_threads(before)


def _work(
    spec: WorkerSpec,
    sequences: list[TokenSequence],
    memory: Any,
    index: int,
    connection: Connection,
) -> None:
    """Run a worker: load, then compute one step at a time until the connection is closed."""
    from mlx_mtp.loading import load
    from mlx_mtp.train.gradient.adapter import new_adapter, trainable
    from mlx_mtp.train.gradient.backend import make_gradient

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when to stop
    try:
        model, _ = load(
            spec.model, trust_remote_code=spec.trust_remote_code, mtp=False, kernels=False
        )
        model = new_adapter(model, spec.settings, start=spec.start)
        gradient, *_ = make_gradient(model, spec.settings, num_threads=1)
        layout = SharedParameters(trainable(model))
        numbers = np.frombuffer(memory, dtype=np.float32).reshape(-1, layout.size)
        while True:
            step, total, places = connection.recv()
            part = gradient.part(
                layout.read(numbers[0]),
                [(place, sequences[number]) for place, number in places],
                step=step,
                total=total,
            )
            if part is not None:
                layout.write(part[0], numbers[index])
            connection.send(part and part[1:])
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
    except Exception as error:  # reaches the user through the first process
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start processes that never receive Ctrl-C, which goes to all processes of a terminal.

    A worker needs seconds until it ignores the signal itself.  This process receives it afterwards.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for new processes."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
