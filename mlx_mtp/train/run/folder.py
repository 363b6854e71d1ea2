"""The folder of a training run: what may be written there, and how a run is resumed.

``training/command.json`` has the options of the run, so that ``--resume`` needs none of them.  A
run counts as begun when it has saved anything: text, a checkpoint or a history.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_mtp.model.config import CONFIG_FILE
from mlx_mtp.storage.files import lock_file, write_atomically
from mlx_mtp.train.run.checkpoint import state_steps

TRAINING = "training"
DATA_FILE = "data.jsonl"
HISTORY_FILE = "history.jsonl"
CURVES_FILE = "curves.png"
SETTINGS_FILE = "settings.json"
COMMAND_FILE = "command.json"
RECIPE_FILE = "recipe.json"
SPENT_FILE = "spent.json"
_LOCK_FILE = ".lock"
_OWN_FILES = {
    COMMAND_FILE,
    DATA_FILE,
    "data.settings.json",
    HISTORY_FILE,
    RECIPE_FILE,
    SPENT_FILE,
    _LOCK_FILE,
}


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
        self.recipe = self.training / RECIPE_FILE
        self.spent = self.training / SPENT_FILE

    def check_new(self) -> None:
        """Refuse a folder that is in use.

        Raises:
            ValueError: it is not empty; the message says what to do.
        """
        if self._is_file():
            raise ValueError(f"{self.path} is a file, not a folder")
        if self.is_begun():
            raise ValueError(
                f"{self.path} contains a training run. Resume it with: {self.resume_command()}; "
                "or choose another folder"
            )
        if (self.path / CONFIG_FILE).exists():
            raise ValueError(
                f"{self.path} contains an adapter: choose another folder, and start from this "
                f"adapter with --resume-adapter-file {shlex.quote(str(self.path))}"
            )
        if foreign := self._foreign_files():
            raise ValueError(
                f"{self.path} is not empty (it contains {foreign[0]}): choose another folder"
            )

    def check_begun(self) -> None:
        """Refuse a folder without a run.

        Raises:
            ValueError: there is nothing to resume.
        """
        if self._is_file() or not self.is_begun():
            raise ValueError(f"{self.path} contains no training run to resume")

    def is_begun(self) -> bool:
        """Whether a run has saved anything here."""
        files = (self.data, self.history, self.training / SETTINGS_FILE)
        is_saved = any(path.is_file() and path.stat().st_size for path in files)
        return is_saved or self.newest_step() is not None

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return max(state_steps(self.training), default=None)

    def resume_command(self) -> str:
        """The command that resumes the run."""
        return f"mlx-mtp train --adapter-path {shlex.quote(str(self.path))} --resume"

    def read_command(self) -> dict[str, Any]:
        """Read what ``write_command`` wrote; empty if the run is not from the command.

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
        """Save the options of a run (``options``) and other facts about it.

        Raises:
            OSError: they cannot be written.
        """
        text = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.training / COMMAND_FILE, text)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it against other processes.

        If nothing is saved in it, it is removed at the end.

        Raises:
            ValueError: another process trains there.
            OSError: it cannot be created.
        """
        self.training.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.training / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            lock_file(lock, path=self.path)
            try:
                yield
            finally:
                self._remove_if_unused()
        finally:
            os.close(lock)

    def _remove_if_unused(self) -> None:
        if self.is_begun():
            return
        with contextlib.suppress(OSError):  # the folder may contain other files
            for name in _OWN_FILES:
                (self.training / name).unlink(missing_ok=True)
            self.training.rmdir()
            self.path.rmdir()

    def _foreign_files(self) -> list[str]:
        """Names of files that are not from a run; hidden files do not count."""
        if not self.path.is_dir():
            return []
        names = sorted(path.name for path in self.path.iterdir() if path.name[0] != ".")
        if names == [TRAINING]:
            inside = sorted(path.name for path in self.training.iterdir() if path.name[0] != ".")
            return [f"{TRAINING}/{name}" for name in inside if name not in _OWN_FILES]
        return names

    def _is_file(self) -> bool:
        return self.path.exists() and not self.path.is_dir()
