"""The flow of ``mlx-mtp train``: folder, model, data, memory, training, summary.

What is cheap and can fail is done first.  The options of a run are kept in its folder; resuming
takes them from there, and refuses others that would make it another run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.loading import load
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, read_config
from mlx_mtp.terminal import Interrupt, one_line
from mlx_mtp.train.data.pipeline import (
    Prepared,
    expected_length,
    kept_records,
    make_records,
    prepare,
    read_source,
    room_for,
)
from mlx_mtp.train.data.records import Record
from mlx_mtp.train.data.topics import read_topics
from mlx_mtp.train.gradient.adapter import new_adapter
from mlx_mtp.train.gradient.workers import WorkerSpec
from mlx_mtp.train.loop import TrainData, TrainResult
from mlx_mtp.train.loop import train as run_loop
from mlx_mtp.train.run.display import Display
from mlx_mtp.train.run.events import Event
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.run.memory import estimate
from mlx_mtp.train.run.summary import finish, tracked_values
from mlx_mtp.train.run.trackers import Tracker, make_tracker
from mlx_mtp.train.settings import DataSettings, TrainSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel

PROJECT = "mlx-mtp"
DATA_OPTIONS = (
    "data", "data_as_is", "num_records", "topics", "max_prompt_tokens", "max_answer_tokens",
    "distil_batch_size", "held_out",
)  # fmt: skip
_PATHS = ("model", "data", "topics", "resume_adapter_file")
_NOT_KEPT = ("adapter_path", "resume", "estimate")
_NEGATIONS = {"no_sampler": "sampler", "no_gate": "gate"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the options of a run mean.

    Attributes:
        settings: for the loop.
        data: for the text.
        options: by name, with full paths, so that a run is resumed from anywhere.
        typed: the same as the user typed them, for the adapter's card.
        start: folder of the adapter to start from.
        resume: whether the run was begun before.
    """

    settings: TrainSettings
    data: DataSettings
    options: dict[str, Any]
    typed: dict[str, Any]
    start: Path | None
    resume: bool


def run(given: Mapping[str, Any]) -> bool:
    """Train an adapter, or only say what it would take.

    Args:
        given: options by name, those alone that the user gave.

    Returns:
        Whether it came to its end; False after Ctrl-C.

    Raises:
        ValueError: something is wrong with the options, the folder, the model or the data, or the
            training cannot go on; one line.
        OSError: a file cannot be read or written.
    """
    folder = RunFolder(Path(given["adapter_path"]).expanduser())
    plan = make_plan(given, folder)
    only_estimate = bool(given.get("estimate"))
    with Display() as display:
        source: list[Record] = []
        has_text = plan.resume and "data_hash" in folder.read_command()
        if not has_text or plan.data.as_is:
            source = read_source(plan.data, output=folder.path, tell=display.tell)
        model, tokenizer = _load(plan, display)
        settings = dataclasses.replace(
            plan.settings,
            max_seq_length=room_for(
                model, plan.settings.max_seq_length, plan.settings.num_draft_tokens
            ),
        )
        plan = dataclasses.replace(plan, settings=settings)
        model = new_adapter(model, settings, start=plan.start)
        lines = _check_memory(model, plan, refuse=not only_estimate)
        if not only_estimate:
            for line in lines:
                display.tell(line)
            with folder.held():
                return _run_in(folder, plan, model, tokenizer, source, display)
    print("\n".join(lines))
    return True


def make_plan(given: Mapping[str, Any], folder: RunFolder) -> Plan:
    """Check the options and the folder.

    Raises:
        ValueError: they are refused.
    """
    resume = bool(given.get("resume"))
    if resume:
        folder.check_begun()
    else:
        folder.check_new()
    typed = {name: value for name, value in given.items() if name not in _NOT_KEPT}
    options = typed | {name: _full_path(typed[name]) for name in _PATHS if name in typed}
    if resume:
        typed = folder.read_command().get("typed", {}) | typed
        options = _resumed(options, folder)
    if (tracker := options.get("report_to")) and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--report-to {tracker} needs it: pip install {tracker}")
    named = options.get("resume_adapter_file")
    start = None if named is None else _adapter_folder(named, own=folder.path if resume else None)
    return Plan(
        settings=_train_settings(options, start),
        data=_data_settings(options),
        options=options,
        typed=typed,
        start=start,
        resume=resume,
    )


def _resumed(options: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The options of a run that is gone on with."""
    command = folder.read_command()
    kept = command.get("options", {})
    fixed = {"model", "resume_adapter_file", *DATA_OPTIONS}
    if "data_hash" not in command:
        fixed -= {"num_records"}  # whoever finds it too many may be content with fewer
    for name in sorted(fixed.intersection(options)):
        if command and options[name] != kept.get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} was {kept.get(name, 'not given')} when the run began, not "
                f"{options[name]}: a run that is resumed keeps it"
            )
    return {**kept, **options}


def _train_settings(options: Mapping[str, Any], start: Path | None) -> TrainSettings:
    """Settings from the options and the adapter that is gone on with, of which only k may differ.

    Raises:
        ValueError: a value is out of range, or the adapter has another.
    """
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    values = {name: value for name, value in options.items() if name in names}
    values |= {_NEGATIONS[name]: False for name in _NEGATIONS if options.get(name)}
    if isinstance(values.get("target_modules"), str):
        modules = (name.strip() for name in values["target_modules"].split(","))
        values["target_modules"] = tuple(name for name in modules if name)
    if start is not None:
        config = read_config(start)
        values.setdefault("num_draft_tokens", config.num_draft_tokens)
        fixed = {"rank": config.rank, "scale": config.scale, "sampler": config.sampler is not None}
        fixed |= {"target_modules": config.target_modules} if config.target_modules else {}
        for name, value in fixed.items():
            if values.setdefault(name, value) != value:
                raise ValueError(f"the adapter {start} has {name} {value}, not {values[name]}")
    return TrainSettings(**values)


def _data_settings(options: Mapping[str, Any]) -> DataSettings:
    names = {"num_records", "max_prompt_tokens", "max_answer_tokens", "held_out", "data", "seed"}
    values = {name: value for name, value in options.items() if name in names}
    if "topics" in options:
        values["topics"] = read_topics(Path(options["topics"]))
    if "distil_batch_size" in options:
        values["batch_size"] = options["distil_batch_size"]
    return DataSettings(as_is=bool(options.get("data_as_is")), **values)


def _full_path(name: str) -> str:
    """A name that means the same from everywhere, if it is a path; hub ids stay as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def _adapter_folder(name: str, *, own: Path | None) -> Path | None:
    """The folder of an adapter, which may be named by its weights.

    A resumed run has the weights in its own state, so the adapter may be gone by then: ``own``, the
    run's folder, holds one of the same shape.
    """
    path = Path(name).expanduser()
    if path.name == WEIGHTS_FILE and path.is_file():
        path = path.parent
    if path.is_dir():
        return path
    if own is not None:
        return own if (own / CONFIG_FILE).is_file() else None
    if path.is_file():
        raise ValueError(f"{name} is neither an adapter folder nor its {WEIGHTS_FILE}")
    raise ValueError(f"adapter {name} does not exist")


def _load(plan: Plan, display: Display) -> tuple[MTPModel, TokenizerWrapper]:
    display.say("Loading ...")
    name = plan.options.get("model")
    model, tokenizer = load(
        name,
        trust_remote_code=bool(plan.options.get("trust_remote_code")),
        mtp=False,
        kernels=False,
        progress=display.say,
    )
    if name is not None and os.path.isdir(name):
        model.name = Path(name).name  # the adapter names its base: no path of somebody's disk
    return model, tokenizer


def _check_memory(
    model: MTPModel, plan: Plan, *, longest: int | None = None, refuse: bool
) -> list[str]:
    if longest is None:
        longest = expected_length(model, plan.data, max_seq_length=plan.settings.max_seq_length)
    found = estimate(model, plan.settings, longest=longest)
    if refuse:
        found.check()
    return found.lines()


def _run_in(
    folder: RunFolder,
    plan: Plan,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: list[Record],
    display: Display,
) -> bool:
    """Write the text, train on it, and say how it went."""
    tracker = make_tracker(
        plan.options.get("report_to"),
        project=plan.options.get("project_name") or PROJECT,
        run=folder.path.name,
        config=plan.settings.to_dict(),
        tell=display.tell,
    )
    command = {"command": command_line(folder, plan.typed)}
    command |= {"options": plan.options, "typed": plan.typed}
    kept_hash = folder.read_command().get("data_hash") if plan.resume else None
    command |= {"data_hash": kept_hash} if kept_hash else {}
    if not plan.resume or folder.newest_step() is None:  # else the loop may refuse the options
        folder.write_command(command)
    with Interrupt() as interrupt:
        try:
            with _nothing_lost(folder):
                prepared = _prepare(
                    folder, plan, model, tokenizer, source, kept_hash, display, interrupt
                )
                command |= {"data_hash": prepared.data_hash}
                if not plan.resume or folder.newest_step() is None:
                    folder.write_command(command)
                _check_memory(model, plan, longest=prepared.longest, refuse=True)
                tell = _teller(display, tracker, lambda: folder.write_command(command))
                result = _train(folder, plan, model, prepared, tell, interrupt)
        except KeyboardInterrupt:
            kept = f"Go on with: {folder.way_on()}" if folder.is_begun() else "Nothing was kept."
            display.tell(f"Stopped. {kept}")
            return False
        finally:
            tracker.finish()
    display.say("")
    finish(folder, model, result, seed=plan.settings.seed, tell=display.tell)
    return result.finished


def _prepare(
    folder: RunFolder,
    plan: Plan,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: list[Record],
    kept_hash: str | None,
    display: Display,
    interrupt: Interrupt,
) -> Prepared:
    """Make the sequences, or read them again."""

    def on_progress(progress: Any) -> None:
        display.data(progress)
        interrupt.check()

    if kept_hash is not None and not plan.data.as_is:
        records = kept_records(folder.data, plan.data, wanted_hash=kept_hash)
    else:
        if not plan.data.as_is:
            display.say("Writing text ...")
        records = make_records(
            model, tokenizer, source, folder.data, plan.data,
            progress=on_progress, tell=display.tell,
        )  # fmt: skip
    interrupt.check()
    prepared = prepare(
        records,
        tokenizer,
        max_seq_length=plan.settings.max_seq_length,
        held_out=plan.data.held_out,
    )
    if kept_hash is not None and prepared.data_hash != kept_hash:
        raise ValueError(f"{plan.data.data} was changed since the run began")
    for line in prepared.lines:
        display.tell(line)
    return prepared


def _train(
    folder: RunFolder,
    plan: Plan,
    model: MTPModel,
    prepared: Prepared,
    on_event: Callable[[Event], None],
    interrupt: Interrupt,
) -> TrainResult:
    data = TrainData(train=prepared.train, held_out=prepared.held_out, data_hash=prepared.data_hash)
    return run_loop(
        model,
        data,
        plan.settings,
        folder.path,
        resume=plan.resume and folder.newest_step() is not None,
        workers=WorkerSpec(
            model=plan.options.get("model"),
            trust_remote_code=bool(plan.options.get("trust_remote_code")),
            start=plan.start,
            settings=plan.settings,
        ),
        on_event=on_event,
        should_stop=lambda: interrupt.requested,
    )


def _teller(
    display: Display, tracker: Tracker, at_first: Callable[[], None]
) -> Callable[[Event], None]:
    waiting = [at_first]

    def tell(event: Event) -> None:
        while waiting:
            waiting.pop()()
        display.event(event)
        if values := tracked_values(event):
            tracker.log(values, step=event.step)

    return tell


@contextlib.contextmanager
def _nothing_lost(folder: RunFolder) -> Iterator[None]:
    """Say of a full disk, or of a training that cannot go on, what still stands."""
    try:
        yield
    except (OSError, ValueError) as error:
        step = folder.newest_step()
        if step is None and (isinstance(error, ValueError) or not folder.is_begun()):
            raise
        kept = "the text so far" if step is None else f"the checkpoint of step {step}"
        way_on = f", go on with: {folder.way_on()}" if isinstance(error, OSError) else ""
        raise ValueError(f"{one_line(error)}; {kept} is kept{way_on}") from error


def command_line(folder: RunFolder, options: Mapping[str, Any]) -> str:
    """The command that makes such a run."""
    words = ["mlx-mtp", "train", "--adapter-path", str(folder.path)]
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
