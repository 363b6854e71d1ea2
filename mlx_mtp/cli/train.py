"""The command that trains an adapter: its options, and the file that may hold them.

Names and meanings are mlx-lm's where it has them.  Every option is None unless given, for what is
not given comes from the file, from the run that is resumed, or from the defaults in ``train/``;
the help texts name these, and a test compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_mtp.terminal import INTERRUPTED

TEACHERS = ("argmax", "sample", "dist")
TRACKERS = ("trackio", "wandb")
COUNT, AMOUNT = click.IntRange(1), click.FloatRange(0)


class GroupedOption(click.Option):
    """An option that stands under a heading in the help text."""

    def __init__(self, *args: Any, group: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help text has a heading for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those without a group last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _option(group: str, *names: str, kind: Any = None, **extra: Any) -> Callable[..., Any]:
    if extra.get("is_flag"):
        return click.option(*names, cls=GroupedOption, group=group, default=None, **extra)
    if isinstance(kind, click.IntRange | click.FloatRange):
        extra["metavar"] = "N" if isinstance(kind, click.IntRange) else "X"
    return click.option(*names, cls=GroupedOption, group=group, type=kind, **extra)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all options, in the order of the help text."""
    families = (_model_options(), _data_options(), _adapter_options(), _training_options())
    for option in reversed([each for family in families for each in family]):
        command = option(command)
    return command


def _model_options() -> list[Callable[..., Any]]:
    group = "Model and run"
    return [
        _option(group, "--model", help="Model folder or hub id; the embedded model by default."),
        _option(group, "--adapter-path", metavar="OUT", help="Folder for the adapter (required)."),
        _option(
            group, "--resume", is_flag=True,
            help="Go on with the run in OUT; its options are known.",
        ),
        _option(
            group, "--resume-adapter-file", metavar="ADAPTER",
            help="Adapter to start from: a folder or its adapters.safetensors.",
        ),
        _option(
            group, "--estimate", is_flag=True,
            help="Say how much memory it takes, and train nothing.",
        ),
        _option(
            group, "--config", "-c", metavar="FILE", help="YAML file with options, by name."
        ),
        _option(
            group, "--trust-remote-code", is_flag=True, help="Let the tokenizer run its code."
        ),
    ]  # fmt: skip


def _data_options() -> list[Callable[..., Any]]:
    group = "Data"
    return [
        _option(
            group, "--data", metavar="DATA",
            help="JSONL file, folder or hub id whose prompts the model answers; "
            "without it the model writes the prompts too.",
        ),
        _option(
            group, "--data-as-is", is_flag=True, help="Train on the answers that the data hold."
        ),
        _option(
            group, "--num-records", kind=COUNT,
            help="Conversations to write.  [default: 1000, or all of the data]",
        ),
        _option(
            group, "--topics", metavar="FILE",
            help="A topic a line; one that ends in ... begins the user's message.",
        ),
        _option(
            group, "--max-prompt-tokens", kind=COUNT,
            help="Longest prompt.  [default: 256, or 512 with --data]",
        ),
        _option(
            group, "--max-answer-tokens", kind=COUNT, help="Longest answer.  [default: 512]"
        ),
        _option(
            group, "--distil-batch-size", kind=COUNT,
            help="Texts written together.  [default: 16]",
        ),
        _option(
            group, "--held-out", kind=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Share of the texts to evaluate on.  [default: 0.05]",
        ),
        _option(
            group, "--max-seq-length", kind=COUNT,
            help="Longer texts are cut.  [default: 2048]",
        ),
    ]  # fmt: skip


def _adapter_options() -> list[Callable[..., Any]]:
    group = "Adapter and loss"
    return [
        _option(
            group, "--num-draft-tokens", kind=COUNT, help="Mask tokens, k.  [default: 8]"
        ),
        _option(group, "--rank", kind=COUNT, help="Rank of the LoRA weights.  [default: 32]"),
        _option(group, "--scale", kind=AMOUNT, help="Factor of LoRA.  [default: 2.0]"),
        _option(
            group, "--target-modules", metavar="NAMES",
            help="Layers with LoRA, commas between.  [default: all projections]",
        ),
        _option(group, "--no-sampler", is_flag=True, help="Leave out the sampler head."),
        _option(
            group, "--no-gate", is_flag=True,
            help="Ordinary LoRA, which changes the model's output; for comparison alone.",
        ),
        _option(
            group, "--teacher", kind=click.Choice(TEACHERS),
            help="Learn the model's likeliest token, a drawn one, or all.  [default: argmax]",
        ),
        _option(
            group, "--base-weight", kind=AMOUNT, help="Weight of cross-entropy.  [default: 1.0]"
        ),
        _option(
            group, "--sampler-weight", kind=AMOUNT,
            help="Weight of the sampler's cross-entropy.  [default: 1.0]",
        ),
        _option(
            group, "--lcm-weight", kind=AMOUNT,
            help="Weight of latent consistency.  [default: 1.0]",
        ),
        _option(
            group, "--num-anchors", kind=COUNT, help="Mask blocks per text.  [default: 32]"
        ),
        _option(
            group, "--drop-late", kind=click.FloatRange(0, 1, max_open=True),
            help="Chance that a block ends early, at each mask.  [default: 0.0]",
        ),
    ]  # fmt: skip


def _training_options() -> list[Callable[..., Any]]:
    group = "Training"
    return [
        _option(group, "--iters", kind=COUNT, help="Steps.  [default: 1000]"),
        _option(group, "--batch-size", kind=COUNT, help="Texts per step.  [default: 4]"),
        _option(group, "--learning-rate", kind=AMOUNT, help="Its peak.  [default: 0.0005]"),
        _option(
            group, "--warmup", kind=click.IntRange(0), help="Steps to the peak.  [default: 50]"
        ),
        _option(
            group, "--min-learning-rate", kind=AMOUNT,
            help="Share of the peak that the cosine ends in.  [default: 0.05]",
        ),
        _option(group, "--weight-decay", kind=AMOUNT, help="AdamW's.  [default: 0.01]"),
        _option(
            group, "--clip", kind=AMOUNT,
            help="Largest norm of a gradient; 0 does not clip.  [default: 1.0]",
        ),
        _option(
            group, "--seed", kind=click.IntRange(0, 2**63 - 1),
            help="Decides all random draws.  [default: 0]",
        ),
        _option(
            group, "--rows-per-forward", kind=COUNT,
            help="Mask rows computed at once; fewer save memory.  [default: 128]",
        ),
        _option(
            group, "--candidates", kind=click.IntRange(0),
            help="Take losses over that many likely tokens; 0 is the whole vocabulary, which takes "
            "longer on a CPU.  [default: 0]",
        ),
        _option(
            group, "--workers", kind=click.IntRange(0),
            help="Processes; 0 is one a core on a Linux CPU, else one.  [default: 0]",
        ),
        _option(
            group, "--grad-checkpoint", is_flag=True,
            help="Compute layers again for the gradient, to save memory.",
        ),
        _option(
            group, "--steps-per-report", kind=COUNT, help="Steps between reports.  [default: 10]"
        ),
        _option(
            group, "--steps-per-eval", kind=COUNT,
            help="Steps between evaluations.  [default: 100]",
        ),
        _option(
            group, "--val-batches", kind=click.IntRange(-1),
            help="Held-out texts per evaluation; -1 takes all.  [default: 16]",
        ),
        _option(
            group, "--save-every", kind=COUNT, help="Steps between checkpoints.  [default: 100]"
        ),
        _option(
            group, "--report-to", kind=click.Choice(TRACKERS), help="Send the curves there too."
        ),
        _option(
            group, "--project-name", help="Project for --report-to.  [default: mlx-mtp]"
        ),
    ]  # fmt: skip


@click.command(cls=GroupedCommand)
@_options
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train an adapter for a model; without --data the model writes its own text.

    Ctrl-C saves; --resume goes on, bit for bit.
    """
    given = _given(options)
    file = given.pop("config", None)
    if file is not None:
        given = _from_file(Path(file).expanduser(), context) | given
    if "adapter_path" not in given:
        raise ValueError("--adapter-path is missing: the folder to write the adapter to")
    for name in ("model", "adapter_path", "data", "topics", "resume_adapter_file"):
        if given.get(name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    from mlx_mtp.train.command import run

    if not run(given):
        sys.exit(INTERRUPTED)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that say something."""
    unsaid = (None, False)  # by identity: 0 says something
    return {
        name: value for name, value in options.items() if not any(value is each for each in unsaid)
    }


def _from_file(path: Path, context: click.Context) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ValueError: it is no YAML mapping, or a key or value is none of ours.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options, one 'name: value' a line")
    known = {each.name: each for each in context.command.params if each.name != "config"}
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown option {str(key)!r}")
        if isinstance(value, list) and name == "target_modules":
            value = ",".join(str(each) for each in value)
        if value is None:
            continue
        is_flag = getattr(known[name], "is_flag", False)
        is_cut = isinstance(value, float) and isinstance(known[name].type, click.IntRange)
        if is_cut or isinstance(value, list | dict) or isinstance(value, bool) != is_flag:
            raise ValueError(f"{path}: {key}: {value!r} is not what this option takes")
        try:
            found[name] = known[name].type_cast_value(context, value)
        except click.BadParameter as error:
            raise ValueError(f"{path}: {key}: {error.message}") from None
    return _given(found)
