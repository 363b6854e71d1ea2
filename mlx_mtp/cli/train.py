"""The command ``mlx-mtp train``: its options, and the file that may contain them.

Names and meanings are mlx-lm's where it has them.  Only options that the user sets are passed on:
the others come from the file, from the run that is resumed, or from the defaults of the settings.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import cloup
from click.core import ParameterSource

from mlx_mtp.cli.options import MODEL, TRUST_REMOTE_CODE, Decorator, field_option, option
from mlx_mtp.terminal import INTERRUPTED
from mlx_mtp.train.recipe import parse_time
from mlx_mtp.train.settings import ADAPTER, DATA, TRAINING, DataSettings, TrainSettings

TRACKERS = ("trackio", "wandb")
PATHS = ("model", "adapter_path", "data", "topics", "resume_adapter_file")
PLACEHOLDERS = {
    "data": "DATA",
    "topics": "FILE",
    "target_modules": "NAME,...",
    "rank_by_layer": "LAYERS=RANK,...",
}  # of text options


class RunTime(click.ParamType):
    """A time that ``recipe.parse_time`` reads; the text is kept."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the text."""
        try:
            parse_time(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def _group(title: str, *more: Decorator) -> Decorator:
    """Add the options of one group of settings."""
    options = [
        field_option(settings, field.name, **_attributes(field.name))
        for settings in (DataSettings, TrainSettings)
        for field in fields(settings)
        if field.metadata.get("group") == title
    ]
    return cloup.option_group(title, *options, *more)


def _attributes(name: str) -> dict[str, Any]:
    """Attributes of an option that takes text."""
    return {"type": str, "metavar": PLACEHOLDERS[name]} if name in PLACEHOLDERS else {}


@cloup.command()
@cloup.option_group(
    "Model and run",
    MODEL,
    option("--adapter-path", metavar="OUT", help="Folder to write the adapter to (required)."),
    option(
        "--time",
        type=RunTime(),
        metavar="TIME",
        help="Time for the whole run, such as 30m, 2h, 1h30m or overnight (10 hours). All "
        "other settings follow from it.",
    ),
    option(
        "--resume",
        is_flag=True,
        help="Resume the run in OUT with its options. With --time, the time left is kept; another "
        "--time is a new total.",
    ),
    option(
        "--resume-adapter-file",
        metavar="ADAPTER",
        help="Adapter to start from: a folder or its adapters.safetensors.",
    ),
    option(
        "--estimate",
        is_flag=True,
        help="Print the expected memory and train nothing.",
    ),
    option("--config", "-c", metavar="FILE", help="YAML file with options, by name."),
    TRUST_REMOTE_CODE,
)
@_group(DATA)
@_group(ADAPTER)
@_group(
    TRAINING,
    option(
        "--report-to", type=click.Choice(TRACKERS), help="Also send the curves to this tracker."
    ),
    option(
        "--project-name",
        metavar="NAME",
        help="Project for --report-to.",
        show_default="mlx-mtp",
    ),
)
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train an adapter for a model.

    With --time, nothing else needs to be set. Without --data the model generates its own training
    text. Ctrl-C saves the run, and --resume continues it bit for bit.
    """
    chosen = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    file = chosen.pop("config", None)
    if file is not None:
        chosen = _from_file(Path(file).expanduser(), context) | chosen
    if "adapter_path" not in chosen:
        raise ValueError("--adapter-path is missing: the folder to write the adapter to")
    for name in PATHS:
        if chosen.get(name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    from mlx_mtp.train.command import run

    if not run(chosen):
        sys.exit(INTERRUPTED)


def _from_file(path: Path, context: click.Context) -> dict[str, Any]:
    """Read options from a YAML file.

    Raises:
        ValueError: it is not a YAML mapping, or a key or value is not an option's.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain options, one 'name: value' per line")
    known = {option.name: option for option in context.command.params if option.name != "config"}
    chosen = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown option {str(key)!r}")
        if isinstance(value, list) and name == "target_modules":
            value = ",".join(str(module) for module in value)
        if value is None or value is False:
            continue
        is_flag = getattr(known[name], "is_flag", False)
        is_cut = isinstance(value, float) and isinstance(known[name].type, click.IntRange)
        if is_cut or isinstance(value, list | dict) or isinstance(value, bool) != is_flag:
            raise ValueError(f"{path}: {key}: {value!r} is not a value of this option")
        try:
            chosen[name] = known[name].type_cast_value(context, value)
        except click.BadParameter as error:
            raise ValueError(f"{path}: {key}: {error.message}") from None
    return chosen
