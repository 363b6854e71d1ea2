"""Experiment trackers: where curves go besides the history, if the user wants them somewhere.

A tracker that fails while training goes on is told once and then left alone: no service may stop
a run of hours.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mlx_mtp.terminal import one_line

TRACKERS = ("trackio", "wandb")


class Tracker:
    """Sends values to a service; this one sends them nowhere."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send the values of a step, by name."""

    def finish(self) -> None:
        """Send what is left and let go."""


def make_tracker(
    name: str | None,
    *,
    project: str,
    run: str | None,
    config: Mapping[str, Any],
    tell: Callable[[str], None] | None = None,
) -> Tracker:
    """Open a tracker.

    Args:
        name: one of ``TRACKERS``; None sends nothing.
        project: under which the service files the run.
        run: name of the run; None lets the service choose.
        config: settings to show with it.
        tell: called with a line of text when the tracker fails later; None writes to stderr.

    Raises:
        ValueError: there is no such tracker, its package is missing, or it cannot be opened.
    """
    if name is None:
        return Tracker()
    if name not in TRACKERS:
        raise ValueError(f"there is no tracker {name!r}, only {', '.join(TRACKERS)}")
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed: pip install {name}") from None
    try:
        opened = module.init(project=project, name=run, config=dict(config))
    except Exception as error:  # whatever a service raises, it is one line here
        raise ValueError(f"{name} cannot be opened: {one_line(error)}") from None
    return _Service(name, opened, module, tell or _to_stderr)


class _Service(Tracker):
    """A run of trackio or wandb, which are used alike."""

    def __init__(self, name: str, run: Any, module: Any, tell: Callable[[str], None]) -> None:
        self._name = name
        self._run = run
        self._module = module
        self._tell = tell
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
            self._tell(f"{self._name} failed and gets no more: {one_line(error)}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
