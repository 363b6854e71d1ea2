"""Trackers get what a training run reports, and never stop it."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_mtp.train.run.trackers import make_tracker


class FakeService:
    """Stands in for the module of trackio or wandb."""

    def __init__(self, *, fails: bool = False) -> None:
        self.seen: list[Any] = []
        self.fails = fails

    def init(self, **options: Any) -> Any:
        self.seen.append(options)
        return SimpleNamespace(log=self.log)

    def log(self, values: dict[str, float], *, step: int) -> None:
        if self.fails:
            raise ConnectionError("no network\nat all")
        self.seen.append((step, values))

    def finish(self) -> None:
        self.seen.append("finished")


def test_no_tracker_takes_everything() -> None:
    tracker = make_tracker(None, project="p", run=None, config={})
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)  # type: ignore[arg-type]
    tracker = make_tracker(name, project="p", run="r", config={"rank": 4})
    tracker.log({"loss": 1.0}, step=10)
    tracker.finish()
    first = {"project": "p", "name": "r", "config": {"rank": 4}}
    assert service.seen == [first, (10, {"loss": 1.0}), "finished"]


def test_a_tracker_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeService(fails=True))  # type: ignore[arg-type]
    told: list[str] = []
    tracker = make_tracker("wandb", project="p", run=None, config={}, log=told.append)
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step=step)
    tracker.finish()
    assert told == ["wandb failed and is ignored from now on: no network at all"]


def test_a_tracker_that_is_missing_or_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="trackio is not installed: pip install trackio"):
        make_tracker("trackio", project="p", run=None, config={})
    with contextlib.suppress(KeyError):
        monkeypatch.delitem(sys.modules, "trackio")
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trackio cannot be opened"):
        make_tracker("trackio", project="p", run=None, config={})
    with pytest.raises(ValueError, match="tracker must be one of .* got 'mlflow'"):
        make_tracker("mlflow", project="p", run=None, config={})
