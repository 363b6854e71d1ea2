"""The steps of ``mlx-mtp train``: folder, model, text, memory check, training, summary.

Cheap checks that can fail come first, those of the options in ``plan``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.loading import load
from mlx_mtp.storage.contents import look, unconverted_adapter
from mlx_mtp.terminal import Interrupt, one_line, show
from mlx_mtp.train import timed
from mlx_mtp.train.data.contamination import BENCHMARKS
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.data.pipeline import (
    Prepared,
    expected_length,
    make_records,
    prepare,
    read_source,
    room_for,
    sampled,
    saved_records,
)
from mlx_mtp.train.data.records import Record, read_jsonl
from mlx_mtp.train.gradient.adapter import new_adapter
from mlx_mtp.train.loop import TrainData, TrainResult
from mlx_mtp.train.loop import train as run_loop
from mlx_mtp.train.plan import Plan, make_plan
from mlx_mtp.train.recipe import Recipe
from mlx_mtp.train.run.display import Display
from mlx_mtp.train.run.events import Event
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.run.memory import estimate
from mlx_mtp.train.run.summary import finish, tracked_values
from mlx_mtp.train.run.trackers import Tracker, make_tracker

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel

PROJECT = "mlx-mtp"
_COMPARED = "compared_with"  # in the command of a run: benchmarks its text was compared with
_DATA_FACTS = ("data_hash", _COMPARED, "contamination")


def run(options: Mapping[str, Any]) -> bool:
    """Train an adapter, or only estimate the memory.

    Args:
        options: by name, only those that the user set.

    Returns:
        Whether the run finished; False after Ctrl-C.

    Raises:
        ValueError: an option, the folder, the model or the data are invalid, or training cannot
            continue; one line.
        OSError: a file cannot be read or written.
    """
    began = timed.CLOCK()
    folder = RunFolder(Path(options["adapter_path"]).expanduser())
    plan = dataclasses.replace(make_plan(options, folder), began=began)
    only_estimate = bool(options.get("estimate"))
    with Display() as display:
        source: list[Record] = []
        has_text = plan.resume and "data_hash" in folder.read_command()
        if not has_text or plan.data.as_is:
            source = read_source(plan.data, output=folder.path, log=display.log)
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
                display.log(line)
            with folder.locked():
                return _run_in(folder, plan, model, tokenizer, source, display)
    show("\n".join(lines))
    return True


def _load(plan: Plan, display: Display) -> tuple[MTPModel, TokenizerWrapper]:
    display.status("Loading ...")
    name = plan.options.get("model")
    is_new = plan.start is None
    if (
        name
        and is_new
        and os.path.isdir(name)
        and (unused := unconverted_adapter(look(Path(name)), name))
    ):
        display.log(f"The new adapter starts from the base model: {unused}")
    model, tokenizer = load(
        name,
        trust_remote_code=bool(plan.options.get("trust_remote_code")),
        mtp=False,
        kernels=False,
        progress=display.status,
    )
    if name is not None and os.path.isdir(name):
        model.name = Path(name).name  # the adapter's config names the base: no local paths
    return model, tokenizer


def _check_memory(
    model: MTPModel, plan: Plan, *, longest: int | None = None, refuse: bool
) -> list[str]:
    if longest is None:
        longest = expected_length(model, plan.data, max_seq_length=plan.settings.max_seq_length)
    memory = estimate(model, plan.settings, longest=longest)
    if refuse:
        memory.check()
    return memory.lines()


def _run_in(
    folder: RunFolder,
    plan: Plan,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: list[Record],
    display: Display,
) -> bool:
    """Generate the text, train on it, and print the summary."""
    tracker = make_tracker(
        plan.options.get("report_to"),
        project=plan.options.get("project_name") or PROJECT,
        run=folder.path.name,
        config=plan.settings.to_dict(),
        log=display.log,
    )
    command = {"command": command_line(folder, plan.typed)}
    command |= {"options": plan.options, "typed": plan.typed}
    saved = folder.read_command() if plan.resume else {}
    run = _timed_run(folder, plan, model, tokenizer, source, saved.get("data_hash"), display)
    if run is not None:
        plan = _with_recipe(plan, run.recipe)
        source = sampled(source, plan.data)
    command |= {name: saved[name] for name in _DATA_FACTS if name in saved}
    if not plan.resume or folder.newest_step() is None:  # else the loop may refuse the options
        folder.write_command(command)
    with Interrupt() as interrupt:
        try:
            with _errors_name_what_is_saved(folder):
                prepared = _prepare(
                    folder, plan, run, model, tokenizer, source, saved, display, interrupt
                )
                command |= {"data_hash": prepared.data_hash}
                if (contamination := prepared.contamination) is not None:
                    command |= {_COMPARED: list(contamination.names)}
                    command |= {"contamination": str(contamination)}
                if not plan.resume or folder.newest_step() is None:
                    folder.write_command(command)
                _check_memory(model, plan, longest=prepared.longest, refuse=True)
                on_event = _event_handler(display, tracker, lambda: folder.write_command(command))
                result = _train(folder, plan, run, model, prepared, on_event, interrupt)
        except KeyboardInterrupt:
            is_saved = folder.is_begun()
            rest = f"Resume with: {folder.resume_command()}" if is_saved else "Nothing was saved."
            display.log(f"Stopped. {rest}")
            return False
        finally:
            tracker.finish()
    display.clear()
    finish(folder, model, result, seed=plan.settings.seed, log=display.log)
    return result.finished


def _timed_run(
    folder: RunFolder,
    plan: Plan,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: list[Record],
    saved_hash: str | None,
    display: Display,
) -> timed.TimedRun | None:
    """Measure and choose the recipe of a run with a time, or read it; None without a time."""
    if plan.total_s is None:
        return None
    shared: dict[str, Any] = {
        "time_text": plan.options["time"],
        "total_s": plan.total_s,
        "began": plan.began,
        "user": plan.chosen,
    }
    if plan.resume:
        run = timed.resume(folder, model, may_change=saved_hash is None, **shared)
        if folder.newest_step() is None:  # else the loop reports it
            display.log(run.resume_line())
    else:
        display.status("Measuring the speed of this machine ...")
        spec = plan.worker_spec()
        run = timed.begin(
            folder, model, tokenizer, data=plan.data, source=source, spec=spec, **shared
        )
        for line in run.lines():
            display.log(line)
        run.save_spent()
    run.save()
    return run


def _with_recipe(plan: Plan, recipe: Recipe) -> Plan:
    """The plan with what a recipe decides; given options win."""
    values = {name: value for name, value in recipe.settings.items() if name not in plan.chosen}
    data = plan.data
    if not data.as_is:
        data = dataclasses.replace(data, num_records=recipe.num_records)
    settings = dataclasses.replace(plan.settings, **values)
    return dataclasses.replace(plan, settings=settings, data=data)


def _prepare(
    folder: RunFolder,
    plan: Plan,
    run: timed.TimedRun | None,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: list[Record],
    saved: Mapping[str, Any],
    display: Display,
    interrupt: Interrupt,
) -> Prepared:
    """Make the sequences, or read them again."""

    def on_progress(progress: DistilProgress) -> None:
        display.data(progress)
        interrupt.check()
        if run is not None:
            run.on_text(progress.num_records)

    saved_hash = saved.get("data_hash")
    compare_with = BENCHMARKS if saved_hash is None else saved.get(_COMPARED)
    if saved_hash is not None and not plan.data.as_is:
        records = saved_records(folder.data, plan.data, data_sha256=saved_hash)
    else:
        if not plan.data.as_is:
            display.status("Generating text ...")
        try:
            records = make_records(
                model,
                tokenizer,
                source,
                folder.data,
                plan.data,
                progress=on_progress,
                log=display.log,
            )
        except timed.TextTimeIsUp:
            assert run is not None
            records = read_jsonl(folder.data)
            run.end_text(len(records))
            display.log(f"The time for text is over with {len(records)} records")
    interrupt.check()
    prepared = prepare(
        records,
        tokenizer,
        max_seq_length=plan.settings.max_seq_length,
        held_out=plan.data.held_out,
        compare_with=compare_with,
    )
    if saved_hash is not None and prepared.data_hash != saved_hash:
        raise ValueError(f"{plan.data.data} was changed since the run began")
    if saved_hash is not None and prepared.contamination is not None:
        missing = {*(compare_with or ())} - {*prepared.contamination.names}
        if missing:  # other texts would be left out than when the run began
            raise ValueError(prepared.lines[0])
    for line in prepared.lines:
        display.log(line)
    return prepared


def _train(
    folder: RunFolder,
    plan: Plan,
    run: timed.TimedRun | None,
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
        budget=run and run.budget(),
        workers=plan.worker_spec(),
        on_event=on_event,
        should_stop=lambda: interrupt.requested,
    )


def _event_handler(
    display: Display, tracker: Tracker, on_first: Callable[[], None]
) -> Callable[[Event], None]:
    pending = [on_first]

    def on_event(event: Event) -> None:
        while pending:
            pending.pop()()
        display.event(event)
        if values := tracked_values(event):
            tracker.log(values, step=event.step)

    return on_event


@contextlib.contextmanager
def _errors_name_what_is_saved(folder: RunFolder) -> Iterator[None]:
    """Add to an error, such as a full disk, what is saved and how to resume."""
    try:
        yield
    except (OSError, ValueError) as error:
        step = folder.newest_step()
        if step is None and (isinstance(error, ValueError) or not folder.is_begun()):
            raise
        saved = "the text so far" if step is None else f"the checkpoint of step {step}"
        text = f"{one_line(error)}; {saved} is saved"
        if isinstance(error, OSError):
            text += f". Resume with: {folder.resume_command()}"
        raise ValueError(text) from error


def command_line(folder: RunFolder, options: Mapping[str, Any]) -> str:
    """The command that starts such a run."""
    words = ["mlx-mtp", "train", "--adapter-path", str(folder.path)]
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
