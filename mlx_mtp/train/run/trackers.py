"""Experiment trackers, which receive the curves in addition to the history.

A tracker that fails during training is reported once and then ignored: no service may stop a long
run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mlx_mtp.terminal import one_line, show

TRACKERS = ("trackio", "wandb")


class Tracker:
    """Sends values to a service; this base class discards them."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send the values of a step, by name."""

    def finish(self) -> None:
        """Send the remaining values and close."""


def make_tracker(
    name: str | None,
    *,
    project: str,
    run: str | None,
    config: Mapping[str, Any],
    log: Callable[[str], None] | None = None,
) -> Tracker:
    """Open a tracker.

    Args:
        name: one of ``TRACKERS``, or None.
        project: of the run at the service.
        run: name of the run; None lets the service choose.
        config: settings of the run.
        log: called with a line if the tracker fails later; None writes to stderr.

    Raises:
        ValueError: the tracker is unknown, its package is missing, or it cannot be opened.
    """
    if name is None:
        return Tracker()
    if name not in TRACKERS:
        raise ValueError(f"tracker must be one of {', '.join(TRACKERS)}, got {name!r}")
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed: pip install {name}") from None
    try:
        opened = module.init(project=project, name=run, config=dict(config))
    except Exception as error:  # a service may raise anything
        raise ValueError(f"{name} cannot be opened: {one_line(error)}") from None
    return _Service(name, opened, module, log or _to_stderr)


class _Service(Tracker):
    """A run of trackio or wandb, which have the same interface."""

    def __init__(self, name: str, run: Any, module: Any, log: Callable[[str], None]) -> None:
        self._name = name
        self._run = run
        self._module = module
        self._log = log
        self._works = True

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._try(lambda: self._run.log(dict(values), step=step))

    def finish(self) -> None:
        self._try(self._module.finish)

    def _try(self, send: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            send()
        except Exception as error:
            self._works = False
            self._log(f"{self._name} failed and is ignored from now on: {one_line(error)}")


def _to_stderr(line: str) -> None:
    show(line, file=sys.stderr)
