"""Small training runs that differ in one thing each: ``python -m mlx_mtp.lab.ablations``.

All runs see the same records, in the same order, for the same number of steps: ranks from 1 to 64,
and at one rank without LCM, without the sampler head, and without the gate.  Each has a folder of
its own in ``--output``; a run that is finished is passed over and one that was stopped goes on, so
the command may be given again at any time.  ``mlx_mtp.lab.reproduction`` draws them.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.lab.tokens_per_step import stamp
from mlx_mtp.terminal import BadInput, Interrupt, one_line
from mlx_mtp.train.data.pipeline import Prepared, prepare, room_for
from mlx_mtp.train.run.folder import HISTORY_FILE, RunFolder
from mlx_mtp.train.settings import TrainSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel
    from mlx_mtp.train.loop import TrainResult

RANKS = (1, 2, 4, 8, 16, 32, 64)
PARTS: Mapping[str, Mapping[str, Any]] = {
    "no-lcm": {"lcm_weight": 0.0},
    "no-sampler": {"sampler": False, "sampler_weight": 0.0},
    "no-gate": {"gate": False},
}

Load = Callable[[], "tuple[MTPModel, TokenizerWrapper]"]


def variants(settings: TrainSettings, *, ranks: Sequence[int] = RANKS) -> dict[str, TrainSettings]:
    """Settings of each run by its name: one for each rank, and those that lack a part.

    Args:
        settings: shared by all; its rank, which is added to ``ranks``, is that of the runs that
            lack a part.
        ranks: ranks to train.

    Raises:
        ValueError: a rank is out of range.
    """
    found = {
        f"rank-{rank}": dataclasses.replace(settings, rank=rank)
        for rank in sorted({*ranks, settings.rank})
    }
    return found | {
        name: dataclasses.replace(settings, **changes) for name, changes in PARTS.items()
    }


def train_variant(
    name: str,
    settings: TrainSettings,
    output: Path,
    *,
    load_model: Load,
    model_name: str | None,
    records: Sequence[Any],
    held_out: float,
    tell: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> TrainResult | None:
    """Train one run, or go on with it.

    Args:
        name: of the run.
        settings: of the run.
        output: its folder.
        load_model: gives a fresh model without an adapter.
        model_name: the same model as ``loading.load`` takes it, for other processes.
        records: what all runs train on.
        held_out: share of them that is not trained on.
        tell: called with a line about each evaluation.
        should_stop: asked after each step.

    Returns:
        None if the run was finished before.

    Raises:
        ValueError: the folder holds a run of other settings or data, or training fails.
    """
    from mlx_mtp.train.gradient.adapter import new_adapter
    from mlx_mtp.train.gradient.workers import WorkerSpec
    from mlx_mtp.train.loop import TrainData, train
    from mlx_mtp.train.run.events import Evaluated

    folder = RunFolder(output)
    step = folder.newest_step()
    if step is not None and step >= settings.iters:
        return None
    model, tokenizer = load_model()
    room = room_for(model, settings.max_seq_length, settings.num_draft_tokens)
    settings = dataclasses.replace(settings, max_seq_length=room)
    data: Prepared = prepare(records, tokenizer, max_seq_length=room, held_out=held_out)
    began = time.perf_counter()

    def on_event(event: Any) -> None:
        if isinstance(event, Evaluated):
            tell(
                f"{name}  step {event.step}/{settings.iters}  "
                f"{event.evaluation.tokens_per_step:.3f} tokens per step  "
                f"next-token loss {event.next_token_loss:.4f}  "
                f"{time.perf_counter() - began:.0f} s"
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
        )


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--data", required=True, help="Records that all runs train on, as JSONL.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder of runs.")
@click.option("--only", multiple=True, help="Name of a run to do, such as rank-8; repeatable.")
@click.option("--ranks", default=",".join(map(str, RANKS)), show_default=True)
@click.option("--rank", default=16, show_default=True, help="Of the runs that lack a part.")
@click.option("--num-records", type=int, help="Take the first records alone.")
@click.option("--held-out", default=0.05, show_default=True, help="Share to evaluate on.")
@click.option("--iters", default=200, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--num-anchors", default=32, show_default=True)
@click.option("--num-draft-tokens", default=8, show_default=True)
@click.option("--drop-late", default=0.0, show_default=True)
@click.option("--teacher", default="argmax", show_default=True)
@click.option("--candidates", default=0, show_default=True)
@click.option("--rows-per-forward", default=128, show_default=True)
@click.option("--workers", default=0, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup", default=20, show_default=True)
@click.option("--max-seq-length", default=512, show_default=True)
@click.option("--steps-per-eval", default=50, show_default=True)
@click.option("--val-batches", default=16, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(**options: Any) -> None:
    """Train the runs that the figures compare; the last line is one JSON line."""
    try:
        with Interrupt() as interrupt:
            summary = ablate(options, should_stop=lambda: interrupt.requested)
    except (ValueError, OSError) as error:
        raise BadInput(one_line(error)) from None
    print(json.dumps(summary))
    if not summary["finished"]:
        sys.exit(130)


def ablate(
    options: Mapping[str, Any], *, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Do what the options of ``main`` say; return what the JSON line says."""
    from mlx_mtp.loading import load
    from mlx_mtp.train.data.sources import read_data

    names = {field.name for field in dataclasses.fields(TrainSettings)}
    shared = TrainSettings(**{key: value for key, value in options.items() if key in names})
    wanted = variants(shared, ranks=_ranks(options["ranks"]))
    if unknown := set(options["only"]) - set(wanted):
        raise ValueError(f"no run is named {sorted(unknown)[0]}; there are {', '.join(wanted)}")
    wanted = {name: wanted[name] for name in options["only"] or wanted}
    records = read_data(options["data"])[: options["num_records"]]
    output, finished = Path(options["output"]).expanduser(), []
    for name, settings in wanted.items():
        if should_stop():
            break
        result = train_variant(
            name,
            settings,
            output / name,
            load_model=lambda: load(options["model"], mtp=False, kernels=False),
            model_name=options["model"],
            records=records,
            held_out=options["held_out"],
            tell=lambda line: print(line, file=sys.stderr, flush=True),
            should_stop=should_stop,
        )
        finished += [name] if result is None or result.finished else []
    return {
        "settings": shared.to_dict(),
        "num_records": len(records),
        "runs": {name: _newest(output / name) for name in wanted},
        "finished": len(finished) == len(wanted),
        "figures": " ".join(f"--run {shlex.quote(f'{name}={output / name}')}" for name in wanted),
    } | stamp()


def _ranks(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",") if each.strip()]
    except ValueError:
        raise ValueError(f"--ranks takes numbers with commas between, got {text!r}") from None


def _newest(folder: Path) -> dict[str, Any]:
    """The last evaluation in a run's history, without its curve by position."""
    from mlx_mtp.train.run.history import read_history

    history = RunFolder(folder).training / HISTORY_FILE
    records = read_history(history) if history.is_file() else []
    evaluations = [each for each in records if each.get("kind") == "evaluation"]
    keys = ("step", "tokens_per_step", "next_token_loss")
    return {key: evaluations[-1][key] for key in keys} if evaluations else {}


if __name__ == "__main__":
    main()
