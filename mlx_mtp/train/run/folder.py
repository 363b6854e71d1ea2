"""The folder of a training run: what may be written there, and how a run is gone on with.

``training/command.json`` holds the options that a run was begun with, so that ``--resume`` needs
none of them.  A run counts as begun when it has kept anything: text, a checkpoint, a history.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_mtp.model.config import CONFIG_FILE
from mlx_mtp.storage.files import write_atomically

TRAINING = "training"
DATA_FILE = "data.jsonl"
HISTORY_FILE = "history.jsonl"
CURVES_FILE = "curves.png"
SETTINGS_FILE = "settings.json"
COMMAND_FILE = "command.json"
_LOCK_FILE = ".lock"
_STATE_PREFIX = "state-"


class RunFolder:
    """An output folder.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training = path / TRAINING
        self.data = self.training / DATA_FILE
        self.history = self.training / HISTORY_FILE
        self.curves = self.training / CURVES_FILE

    def check_new(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            ValueError: it does; the message says what to do.
        """
        if self._is_file():
            raise ValueError(f"{self.path} is a file, not a folder")
        if self.is_begun():
            raise ValueError(
                f"{self.path} holds a training run: go on with it by: {self.way_on()}; "
                "or choose another folder"
            )
        if (self.path / CONFIG_FILE).exists():
            raise ValueError(
                f"{self.path} holds an adapter: choose another folder, and start from this adapter "
                f"with --resume-adapter-file {shlex.quote(str(self.path))}"
            )
        others = self._others()
        if others:
            raise ValueError(
                f"{self.path} is not empty (it holds {others[0]}): choose another folder"
            )

    def check_begun(self) -> None:
        """Refuse a folder without a run.

        Raises:
            ValueError: there is nothing to go on with.
        """
        if self._is_file() or not self.is_begun():
            raise ValueError(f"{self.path} holds no training run to resume")

    def is_begun(self) -> bool:
        """Whether a run has kept anything here."""
        files = (self.data, self.history, self.training / SETTINGS_FILE)
        kept = any(path.is_file() and path.stat().st_size for path in files)
        return kept or self.newest_step() is not None

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        folders = self.training.glob(f"{_STATE_PREFIX}*") if self.training.is_dir() else ()
        numbers = [path.name.removeprefix(_STATE_PREFIX) for path in folders if path.is_dir()]
        return max((int(number) for number in numbers if number.isdecimal()), default=None)

    def way_on(self) -> str:
        """The command that goes on with the run."""
        return f"mlx-mtp train --adapter-path {shlex.quote(str(self.path))} --resume"

    def read_command(self) -> dict[str, Any]:
        """What ``write_command`` wrote; empty where the run is not from the command.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.training / COMMAND_FILE
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return {**values, "options": dict(values["options"])}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged") from None

    def write_command(self, values: Mapping[str, Any]) -> None:
        """Keep the options of a run (``options``) and what else tells how it was made.

        Raises:
            OSError: they cannot be written.
        """
        text = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.training / COMMAND_FILE, text)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes from training in it.

        What was made is removed again if nothing was kept.

        Raises:
            ValueError: another process trains there.
            OSError: it cannot be made.
        """
        self.training.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.training / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            _take(lock, self.path)
            try:
                yield
            finally:
                self._tidy()
        finally:
            os.close(lock)

    def _tidy(self) -> None:
        if self.is_begun():
            return
        with contextlib.suppress(OSError):  # what is not ours keeps its folder
            for name in (COMMAND_FILE, DATA_FILE, "data.settings.json", HISTORY_FILE, _LOCK_FILE):
                (self.training / name).unlink(missing_ok=True)
            self.training.rmdir()
            self.path.rmdir()

    def _others(self) -> list[str]:
        """Names of what no run has put here; hidden files do not count."""
        if not self.path.is_dir():
            return []
        names = sorted(each.name for each in self.path.iterdir() if each.name[0] != ".")
        if names == [TRAINING]:
            ours = {COMMAND_FILE, DATA_FILE, "data.settings.json", HISTORY_FILE, _LOCK_FILE}
            found = sorted(each.name for each in self.training.iterdir() if each.name[0] != ".")
            return [f"{TRAINING}/{name}" for name in found if name not in ours]
        return names

    def _is_file(self) -> bool:
        return self.path.exists() and not self.path.is_dir()


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process trains in {path}") from None
    except OSError:
        pass  # a file system without locks
