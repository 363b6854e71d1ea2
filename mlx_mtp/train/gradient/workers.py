"""Other processes that compute a part of each step's gradient, for MLX's CPU back-end.

Matmuls use all cores, everything else in MLX's CPU back-end uses one.  With one process a core,
each with its own copy of the model, the sequences of a step are shared out: parameters go to the
workers and gradients come back through shared memory.  Who computes what is fixed by what the
sequences cost and sums are taken in the order of the workers, so the result depends on their number
but not on their speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import reduction, resource_tracker
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
        model: as ``loading.load`` takes it.
        trust_remote_code: likewise.
        start: adapter folder that the run began with, see ``adapter.new_adapter``.
        settings: of the run.
    """

    model: str | None
    trust_remote_code: bool = False
    start: Path | None = None
    settings: TrainSettings


class SharedParameters:
    """Parameters by name, float32, as one run of numbers that processes can share."""

    def __init__(self, like: Mapping[str, mx.array]) -> None:
        self.shapes = {name: value.shape for name, value in like.items()}
        self.size = sum(value.size for value in like.values())

    def write(self, parameters: Mapping[str, mx.array], numbers: np.ndarray) -> None:
        """Copy parameters into ``numbers``, float32 ``[size]``."""
        at = 0
        for name in self.shapes:
            value = parameters[name]
            numbers[at : at + value.size] = np.array(value, copy=False).reshape(-1)
            at += value.size

    def read(self, numbers: np.ndarray) -> dict[str, mx.array]:
        """Make parameters of a copy of ``numbers``."""
        found, at = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            found[name] = mx.array(numbers[at : at + size].reshape(shape))
            at += size
        return found


class Workers:
    """Processes beside this one that compute gradients; to be used as a context.

    Args:
        spec: what they load.
        sequences: all sequences to train on.
        count: how many processes there are, this one included.
        like: the parameters, for their shapes.

    Raises:
        ValueError: a worker ended; the message says why.
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
        self._ends: list[tuple[Any, Connection]] = []
        bytes_each = self._layout.size * 4
        context = multiprocessing.get_context("spawn")
        try:
            parameters = _shared_file(bytes_each)
            self._given = _numbers(parameters, bytes_each)
            self._found = []
            with _environment(_THREADS, "1"), _ctrl_c_held_back():
                for _ in range(count - 1):
                    gradients = _shared_file(bytes_each)
                    self._found.append(_numbers(gradients, bytes_each))
                    ours, theirs = context.Pipe()
                    files = _ForChild(parameters), _ForChild(gradients)
                    job = (spec, list(sequences), *files, theirs)
                    process = context.Process(target=_work, args=job, daemon=True)
                    process.start()
                    self._ends.append((process, ours))
                    theirs.close()
                    os.close(gradients)
            os.close(parameters)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the others."""
        return [process.pid for process, _ in self._ends]

    def start(
        self,
        parameters: Mapping[str, mx.array],
        chosen: Sequence[int],
        shared: Sequence[Sequence[int]],
        *,
        step: int,
        total: int,
    ) -> None:
        """Let the workers begin a step.

        Args:
            parameters: the trainable parameters.
            chosen: indices of the step's sequences.
            shared: places in ``chosen`` for each process, from ``shares``; the first is this one.
            step: the step's number.
            total: mask rows of the whole step.
        """
        self._layout.write(parameters, self._given)
        for (_, end), part in zip(self._ends, shared[1:], strict=True):
            with contextlib.suppress(OSError):  # ``collect`` says why it is gone
                end.send((step, total, [(at, chosen[at]) for at in part]))

    def collect(self) -> Iterator[tuple[Any, float, dict[str, float]]]:
        """Wait for the workers; yields gradients, loss and terms of each that had a part."""
        for (process, end), numbers in zip(self._ends, self._found, strict=True):
            try:
                reply = end.recv()
            except (EOFError, OSError):
                process.join(5)
                raise ValueError(
                    f"a training worker ended (exit code {process.exitcode})"
                ) from None
            if isinstance(reply, str):
                raise ValueError(f"a training worker failed: {reply}")
            if reply is not None:
                yield self._layout.read(numbers), *reply

    def close(self) -> None:
        """End the workers; may be called twice."""
        for process, end in self._ends:
            end.close()
            process.terminate()
            process.join()
        self._ends = []
        self._given, self._found = np.zeros(0), []


def worker_count(wanted: int, *, batch_size: int) -> int:
    """How many processes train: what is wanted, or with 0 what suits the device.

    More than the sequences of a step would have nothing to do.
    """
    if wanted == 0:
        is_linux_cpu = mx.default_device().type == mx.cpu and sys.platform.startswith("linux")
        wanted = len(os.sched_getaffinity(0)) if is_linux_cpu else 1
    return max(1, min(wanted, batch_size))


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Share work out so that all are done at about the same time.

    The dearest piece that is left goes to whoever has least to do (Graham 1969, longest processing
    time first), so no share is dearer than 4/3 of the best possible one.

    Args:
        costs: of the pieces.
        count: how many there are to share them.

    Returns:
        Indices of each one's pieces, ascending.
    """
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        least = loads.index(min(loads))
        loads[least] += costs[at]
        found[least].append(at)
    return [sorted(each) for each in found]


@contextlib.contextmanager
def one_blas_thread(needed: bool) -> Iterator[None]:
    """Keep OpenBLAS to one thread for a while, for the other cores have work."""
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
    parameters: _ForChild,
    gradients: _ForChild,
    end: Connection,
) -> None:
    """The life of a worker: load, then a step at a time until the other end is closed."""
    from mlx_mtp.loading import load
    from mlx_mtp.train.gradient.adapter import new_adapter, trainable
    from mlx_mtp.train.gradient.step import StepGradient

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when to stop
    try:
        model, _ = load(
            spec.model, trust_remote_code=spec.trust_remote_code, mtp=False, kernels=False
        )
        model = new_adapter(model, spec.settings, start=spec.start)
        gradient = StepGradient(model, spec.settings)
        layout = SharedParameters(trainable(model))
        given = _numbers(parameters.open(), layout.size * 4)
        found = _numbers(gradients.open(), layout.size * 4)
        while True:
            step, total, places = end.recv()
            tree = layout.read(given)
            part = gradient.part(
                tree, [(at, sequences[index]) for at, index in places], step=step, total=total
            )
            if part is not None:
                layout.write(part[0], found)
            end.send(part and part[1:])
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
    except Exception as error:  # goes to the user through the first process
        with contextlib.suppress(OSError):
            end.send(f"{type(error).__name__}: {error}")


class _ForChild:
    """An open file on its way into a process that is being started."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, state: Any) -> None:
        self._descriptor = state.detach()

    def open(self) -> int:
        """The descriptor, in either process."""
        return self._descriptor


def _shared_file(size: int) -> int:
    """A file without a name, in memory where the system has such, so that no kill leaves it.

    Not ``/dev/shm``, of which a container has 64 MB.
    """
    if sys.platform.startswith("linux"):
        descriptor = os.memfd_create("mlx-mtp")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _numbers(descriptor: int, size: int) -> np.ndarray:
    """What a shared file holds, as float32."""
    return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.float32)


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which goes to all of a terminal's processes.

    A worker takes seconds to come as far as ignoring it by itself.  This process sees it after.
    """
    resource_tracker.ensure_running()  # starting it later would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable that new processes find."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
