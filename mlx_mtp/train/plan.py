"""A training run as its options describe it, checked before anything is loaded.

The options of a run are saved in its folder; resuming reads them from there, and refuses options
that would make it a different run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, MTPConfig, read_any_config
from mlx_mtp.storage.contents import adapter_problem, look
from mlx_mtp.train.data.topics import read_topics
from mlx_mtp.train.gradient.adapter import STORAGE, adapter_settings, storage_settings
from mlx_mtp.train.gradient.workers import WorkerSpec
from mlx_mtp.train.recipe import parse_time
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.settings import (
    DataSettings,
    TrainSettings,
    option_name,
    values_from_options,
)

_SHARED = {"seed", "backend"}  # options of the text and of the training
_DATA_OPTIONS = {option_name(field) for field in dataclasses.fields(DataSettings)} - _SHARED
_PATHS = ("model", "data", "topics", "resume_adapter_file")
_NOT_SAVED = ("adapter_path", "resume", "estimate")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run as its options describe it.

    Attributes:
        settings: of the training loop.
        data: settings of the text.
        options: by name, with absolute paths, so that a run can be resumed from any folder.
        typed: options as the user typed them, for the adapter's card.
        start: folder of the adapter to start from.
        resume: whether the run is resumed.
        total_s: seconds of the whole run, if it has a time.
        began: value of the clock when the process began.
    """

    settings: TrainSettings
    data: DataSettings
    options: dict[str, Any]
    typed: dict[str, Any]
    start: Path | None
    resume: bool
    total_s: float | None = None
    began: float = 0.0

    @property
    def chosen(self) -> dict[str, Any]:
        """Values of ``TrainSettings`` that a recipe must not change."""
        chosen = values_from_options(TrainSettings, self.options)
        return chosen | {"num_draft_tokens": self.settings.num_draft_tokens}

    def worker_spec(self) -> WorkerSpec:
        """How other processes load the model."""
        return WorkerSpec(
            model=self.options.get("model"),
            trust_remote_code=bool(self.options.get("trust_remote_code")),
            start=self.start,
            settings=self.settings,
        )


def make_plan(options: Mapping[str, Any], folder: RunFolder) -> Plan:
    """Check the options and the folder.

    Raises:
        ValueError: they are invalid.
    """
    resume = bool(options.get("resume"))
    if resume:
        folder.check_begun()
    else:
        folder.check_new()
    typed = {name: value for name, value in options.items() if name not in _NOT_SAVED}
    options = typed | {name: _full_path(typed[name]) for name in _PATHS if name in typed}
    if resume:
        typed = folder.read_command().get("typed", {}) | typed
        options = _resumed(options, folder)
    if (tracker := options.get("report_to")) and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--report-to {tracker} needs a package: pip install {tracker}")
    adapter = options.get("resume_adapter_file")
    start = (
        None
        if adapter is None
        else _adapter_folder(adapter, folder if resume else None, model=options.get("model"))
    )
    return Plan(
        settings=_train_settings(options, start),
        data=_data_settings(options),
        options=dict(options),
        typed=typed,
        start=start,
        resume=resume,
        total_s=_total_s(options),
    )


def _total_s(options: Mapping[str, Any]) -> float | None:
    """Seconds of ``--time``, if it is among the options."""
    if "time" not in options:
        return None
    if "iters" in options:
        raise ValueError("--iters cannot be used with --time, which decides the number of steps")
    return parse_time(options["time"])


def _resumed(options: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The saved options of a run, updated with those that may change."""
    command = folder.read_command()
    saved = command.get("options", {})
    fixed = {"model", "resume_adapter_file", *_DATA_OPTIONS}
    if "data_hash" not in command:
        fixed -= {"num_records"}  # a user who finds the number too high may accept fewer
    for name in sorted(fixed.intersection(options)):
        if command and options[name] != saved.get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} was {saved.get(name, 'not set')} when the run began, not "
                f"{options[name]}: it cannot be changed when a run is resumed"
            )
    if "time" in options and "time" not in saved:
        raise ValueError(
            f"--time is not for the run in {folder.path}, which began without it: raise --iters"
        )
    return {**saved, **options}


def _train_settings(options: Mapping[str, Any], start: Path | None) -> TrainSettings:
    """Settings from the options, and from the adapter to start from, whose shape they must have.

    Raises:
        ValueError: a value is out of range, or differs from the adapter's, or that has no mask
            tokens.
    """
    values = values_from_options(TrainSettings, options)
    if isinstance(values.get("target_modules"), str):
        modules = (name.strip() for name in values["target_modules"].split(","))
        values["target_modules"] = tuple(name for name in modules if name)
    if start is not None:
        config = read_any_config(start)
        if isinstance(config, MTPConfig) and config.noise_ids:
            raise ValueError(
                f"the adapter {start} has no mask tokens to train: its mask rows are random tokens "
                "(noise_ids)"
            )
        values.setdefault("num_draft_tokens", config.num_draft_tokens)
        if not STORAGE & set(values):  # what is named decides for all of them
            values |= storage_settings(config)
        for name, value in adapter_settings(config).items():
            if values.setdefault(name, value) != value:
                raise ValueError(f"the adapter {start} has {name} {value}, not {values[name]}")
    return TrainSettings(**values)


def _data_settings(options: Mapping[str, Any]) -> DataSettings:
    values = values_from_options(DataSettings, options)
    if "topics" in values:
        values["topics"] = read_topics(Path(values["topics"]))
    return DataSettings(**values)


def _full_path(name: str) -> str:
    """An absolute path if the name is a path; hub ids are unchanged."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def _adapter_folder(
    name: str, resumed: RunFolder | None, *, model: str | None = None
) -> Path | None:
    """The folder of an adapter, which may be named by its weights.

    A resumed run has the weights in its own state, so the adapter may have been removed: the
    folder of the run contains one of the same shape.
    """
    path = Path(name).expanduser()
    if path.name == WEIGHTS_FILE and path.is_file():
        path = path.parent
    if path.is_dir() or look(path).weights:
        if problem := adapter_problem(look(path), name, model=model):
            raise ValueError(problem)
        return path
    if resumed is not None:
        return resumed.path if (resumed.path / CONFIG_FILE).is_file() else None
    if path.is_file():
        raise ValueError(f"{name} is neither an adapter folder nor its {WEIGHTS_FILE}")
    raise ValueError(f"adapter {name} does not exist")
