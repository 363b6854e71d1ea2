"""Several processes compute the gradient that one computes."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.loading import load, read_adapter
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import StepGradient, shares
from mlx_mtp.train.gradient.workers import (
    SharedParameters,
    Workers,
    WorkerSpec,
    worker_count,
)
from mlx_mtp.train.loop import TrainData, train
from tests.helpers.tiny import save_tiny_model
from tests.train.test_loop import SETTINGS, change, texts

BATCH = [0, 1, 2, 3, 4]


def test_parameters_come_out_of_shared_memory_as_they_went_in():
    parameters = {"b": mx.random.normal((3, 4)), "a": mx.arange(5, dtype=mx.float32)}
    layout = SharedParameters(parameters)
    numbers = np.zeros(layout.size, np.float32)
    layout.write(dict(reversed(parameters.items())), numbers)
    found = layout.read(numbers)
    numbers[:] = 0  # what was read is a copy
    assert list(found) == list(parameters)
    assert all(mx.array_equal(found[name], value) for name, value in parameters.items())


def test_no_more_processes_than_sequences():
    assert worker_count(4, batch_size=3) == 3
    assert worker_count(1, batch_size=8) == 1
    assert 1 <= worker_count(0, batch_size=8) <= os.cpu_count()  # type: ignore[operator]


@given(
    costs=st.lists(st.integers(0, 50), max_size=7),
    count=st.integers(1, 3),
)
def test_shares_take_each_piece_once_and_end_about_together(costs, count):
    found = shares([float(cost) for cost in costs], count)
    assert len(found) == count
    assert sorted(at for share in found for at in share) == list(range(len(costs)))
    longest = max(sum(costs[at] for at in share) for share in found)
    best = min(
        max(
            sum(c for c, who in zip(costs, owners, strict=True) if who == one)
            for one in range(count)
        )
        for owners in itertools.product(range(count), repeat=len(costs))
    )
    assert longest <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


def pid_of(workers: Workers) -> int:
    return workers._workers[0][0].pid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
class TestProcesses:
    def test_give_the_gradient_of_one(self, folder):
        model = new_adapter(load(str(folder), mtp=False)[0], SETTINGS)
        parameters, data = trainable(model), texts(5)
        gradient = StepGradient(model, SETTINGS)
        alone = gradient(parameters, data, BATCH, step=3)
        spec = WorkerSpec(model=str(folder), settings=SETTINGS)
        with Workers(spec, data, count=3, like=parameters) as workers:
            found = [gradient(parameters, data, BATCH, step=3, workers=workers) for _ in range(2)]
            few = gradient(parameters, data, [2], step=3, workers=workers)  # the others rest
        assert few.loss == gradient(parameters, data, [2], step=3).loss
        for result in found:
            assert result.num_rows == alone.num_rows
            assert result.loss == pytest.approx(alone.loss, rel=1e-5)
            for name, value in alone.gradients.items():
                assert np.allclose(result.gradients[name], value, atol=1e-5), name
        for name, value in found[0].gradients.items():
            assert mx.array_equal(value, found[1].gradients[name])

    def test_train_the_same_adapter_twice(self, folder, tmp_path):
        settings = change(workers=2, iters=3)
        spec = WorkerSpec(model=str(folder), settings=settings)
        data = TrainData(texts(), texts(2, seed=2), "hash")
        for name in "ab":
            model = new_adapter(load(str(folder), mtp=False)[0], settings)
            assert train(model, data, settings, tmp_path / name, workers=spec).finished
        weights = [read_adapter(tmp_path / name)[1] for name in "ab"]
        assert all(mx.array_equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_that_die_are_reported(self, folder):
        model = new_adapter(load(str(folder), mtp=False)[0], SETTINGS)
        parameters, data = trainable(model), texts(5)
        gradient = StepGradient(model, SETTINGS)
        spec = WorkerSpec(model=str(folder), settings=SETTINGS)
        with Workers(spec, data, count=2, like=parameters) as workers:
            gradient(parameters, data, BATCH, step=0, workers=workers)
            os.kill(pid_of(workers), signal.SIGKILL)
            with pytest.raises(ValueError, match=r"a training worker ended \(exit code -9\)"):
                gradient(parameters, data, BATCH, step=1, workers=workers)

    def test_never_see_ctrl_c(self, folder):
        model = new_adapter(load(str(folder), mtp=False)[0], SETTINGS)
        parameters, data = trainable(model), texts(5)
        spec = WorkerSpec(model=str(folder), settings=SETTINGS)
        with Workers(spec, data, count=2, like=parameters) as workers:
            os.kill(pid_of(workers), signal.SIGINT)  # it has hardly begun
            gradient = StepGradient(model, SETTINGS)
            assert gradient(parameters, data, BATCH, step=0, workers=workers).num_rows
            os.kill(pid_of(workers), signal.SIGINT)
            assert gradient(parameters, data, BATCH, step=1, workers=workers).num_rows

    def test_that_fail_say_why(self, folder):
        model = new_adapter(load(str(folder), mtp=False)[0], SETTINGS)
        parameters, data = trainable(model), texts(5)
        spec = WorkerSpec(model=str(folder / "gone"), settings=SETTINGS)
        with Workers(spec, data, count=2, like=parameters) as workers:
            workers.start(parameters, BATCH, shares([1.0] * len(BATCH), 2), step=0, total=9)
            with pytest.raises(ValueError, match="worker failed: .*gone does not exist"):
                list(workers.collect())
