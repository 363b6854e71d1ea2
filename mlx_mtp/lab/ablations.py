"""Small training runs that differ in one setting each: ``python -m mlx_mtp.lab.ablations``.

All runs see the same records in the same order for the same number of steps: ranks from 1 to 64,
and at one rank without the latent consistency loss, without the sampler head and without the gate.
Each run has its own folder in ``--output``.  The command may be repeated: finished runs are
skipped and stopped runs are resumed.  ``mlx_mtp.lab.reproduction`` draws the runs.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_mtp.cli.options import MODEL, ListOf, field_option, option
from mlx_mtp.lab.commands import command, evaluations, machine_info
from mlx_mtp.terminal import Interrupt
from mlx_mtp.train.data.pipeline import prepare, room_for
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.settings import DataSettings, TrainSettings

RANKS = (1, 2, 4, 8, 16, 32, 64)
DEFAULTS: Mapping[str, Any] = {
    "rank": 16,
    "iters": 200,
    "learning_rate": 1e-3,
    "warmup": 20,
    "max_seq_length": 512,
    "steps_per_eval": 50,
}
"""Values of options whose default differs from that of ``mlx-mtp train``."""
OPTIONS = (*DEFAULTS, "batch_size", "num_anchors", "num_draft_tokens", "drop_late", "teacher",
           "candidates", "rows_per_forward", "workers", "val_batches", "seed")  # fmt: skip
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "no-lcm": {"lcm_weight": 0.0},
    "no-sampler": {"sampler": False, "sampler_weight": 0.0},
    "no-gate": {"gate": False},
}


def variants(settings: TrainSettings, ranks: Sequence[int]) -> dict[str, TrainSettings]:
    """Settings of each run by name: one for each rank, and one for each part left out.

    Args:
        settings: shared by all runs; the runs without a part have its rank, and so has one more.
        ranks: ranks to train.
    """
    changes: dict[str, Mapping[str, Any]] = {
        f"rank-{rank}": {"rank": rank} for rank in sorted({*ranks, settings.rank})
    }
    return {
        name: dataclasses.replace(settings, **change)
        for name, change in (changes | dict(WITHOUT)).items()
    }


def train_variant(
    settings: TrainSettings,
    output: Path,
    *,
    model_name: str | None,
    records: Sequence[Any],
    held_out: float,
    should_stop: Callable[[], bool],
) -> bool:
    """Train one run or resume it; return whether it is finished.

    Args:
        settings: settings of the run.
        output: folder of the run.
        model_name: folder or hub id of the model.
        records: records that all runs train on.
        held_out: fraction of the records held out for evaluation.
        should_stop: checked after each training step.

    Raises:
        ValueError: the folder has a run with other settings or data, or training fails.
    """
    from mlx_mtp.loading import load
    from mlx_mtp.train.gradient.adapter import new_adapter
    from mlx_mtp.train.gradient.workers import WorkerSpec
    from mlx_mtp.train.loop import TrainData, train
    from mlx_mtp.train.run.events import Evaluated

    folder = RunFolder(output)
    step = folder.newest_step()
    if step is not None and step >= settings.iters:
        return True
    model, tokenizer = load(model_name, mtp=False, kernels=False)
    room = room_for(model, settings.max_seq_length, settings.num_draft_tokens)
    settings = dataclasses.replace(settings, max_seq_length=room)
    data = prepare(records, tokenizer, max_seq_length=room, held_out=held_out)
    start = time.perf_counter()

    def on_event(event: Any) -> None:
        if isinstance(event, Evaluated):
            print(
                f"{output.name}  step {event.step}/{settings.iters}  "
                f"{event.evaluation.tokens_per_step:.3f} tokens per step  "
                f"next-token loss {event.next_token_loss:.4f}  "
                f"{time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    with folder.locked():
        return train(
            new_adapter(model, settings),
            TrainData(train=data.train, held_out=data.held_out, data_hash=data.data_hash),
            settings,
            output,
            resume=step is not None,
            workers=WorkerSpec(model=model_name, settings=settings),
            on_event=on_event,
            should_stop=should_stop,
        ).finished


def _train_options(function: Any) -> Any:
    for name in reversed(OPTIONS):
        changes = {"default": DEFAULTS[name]} if name in DEFAULTS else {}
        function = field_option(TrainSettings, name, **changes)(function)
    return function


@command
@MODEL
@option("--data", required=True, help="JSONL file with the records that all runs train on.")
@option("--output", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@option("--only", multiple=True, help="Name of a run to train, such as rank-8; repeatable.")
@option("--ranks", type=ListOf(int, min=1), default=RANKS, help="Ranks to train.")
@option("--num-records", type=int, help="Number of records to use, from the first.")
@field_option(DataSettings, "held_out")
@_train_options
def main(**options: Any) -> dict[str, Any]:
    """Train the runs that the figures compare and print one JSON line."""
    with Interrupt() as interrupt:
        return ablate(options, should_stop=lambda: interrupt.requested)


def ablate(
    options: Mapping[str, Any], *, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train with the options of ``main``; return what its JSON line has."""
    from mlx_mtp.train.data.sources import read_data

    shared = TrainSettings(**{name: options[name] for name in OPTIONS})
    runs = variants(shared, options["ranks"])
    if unknown := set(options["only"]) - set(runs):
        raise ValueError(f"no run is named {sorted(unknown)[0]}; there are {', '.join(runs)}")
    runs = {name: runs[name] for name in options["only"] or runs}
    records = read_data(options["data"])[: options["num_records"]]
    output, finished = options["output"].expanduser(), 0
    for name, settings in runs.items():
        if should_stop():
            break
        finished += train_variant(
            settings,
            output / name,
            model_name=options["model"],
            records=records,
            held_out=options["held_out"],
            should_stop=should_stop,
        )
    return {
        "settings": shared.to_dict(),
        "num_records": len(records),
        "runs": {name: _last_evaluation(output / name) for name in runs},
        "finished": finished == len(runs),
        "figures": " ".join(f"--run {shlex.quote(f'{name}={output / name}')}" for name in runs),
    } | machine_info()


def _last_evaluation(folder: Path) -> dict[str, Any]:
    """The last evaluation of a run, without its acceptance by position."""
    keys = ("step", "tokens_per_step", "next_token_loss")
    return {key: record[key] for record in evaluations(RunFolder(folder))[-1:] for key in keys}


if __name__ == "__main__":
    main()
