"""Small training runs that differ in one setting each: ``python -m mlx_mtp.lab.ablations``.

All runs see the same records in the same order for the same number of steps.  ``--suite figures``:
ranks from 1 to 64, and at one rank without the latent consistency loss, without the sampler head
and without the gate; ``mlx_mtp.lab.reproduction`` draws the runs.  ``--suite recipe``: the choices
behind the defaults of ``mlx-mtp train``, each against ``control`` with the same seed.  Its last
weights are compared on held-out texts that no run evaluates itself, and the differences with their
standard errors are written to ``comparison.md`` (``mlx_mtp.lab.paired``).

Each run has its own folder in ``--output``.  The command may be repeated: finished runs are
skipped and stopped runs are resumed.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_mtp.cli.options import MODEL, ListOf, field_option, option
from mlx_mtp.lab.commands import command, evaluations, machine_info
from mlx_mtp.lab.paired import TextSteps, difference, table, text_steps
from mlx_mtp.storage.files import write_atomically
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
           "candidates", "rows_per_forward", "workers", "val_batches", "seed", "scale", "ema",
           "min_learning_rate", "lora_b_rate", "row_weights", "draft_ramp", "backend")  # fmt: skip
FIGURES, RECIPE = "figures", "recipe"
CONTROL = "control"
COMPARISON = "comparison.md"
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


def recipe_variants(settings: TrainSettings) -> dict[str, TrainSettings]:
    """Settings of each run of the suite ``recipe`` by name: the control and one change each.

    All have the same number of steps; with other anchors the rows of a step stay the same.
    """
    anchors, batch = settings.num_anchors, settings.batch_size
    changes: dict[str, Mapping[str, Any]] = {
        CONTROL: {},
        "reach-weights": {"row_weights": "reach"},
        "rate-x0.5": {"learning_rate": 0.5 * settings.learning_rate},
        "rate-x2": {"learning_rate": 2 * settings.learning_rate},
        "lora-b-x4": {"lora_b_rate": 4 * settings.lora_b_rate},
        "lora-b-x16": {"lora_b_rate": 16 * settings.lora_b_rate},
        "scale-x0.5": {"scale": 0.5 * settings.scale},
        "scale-x2": {"scale": 2 * settings.scale},
        "rank-x0.5": {"rank": max(1, settings.rank // 2)},
        "rank-x2": {"rank": 2 * settings.rank},
        "fewer-anchors": {"num_anchors": max(1, anchors // 2), "batch_size": 2 * batch},
        "more-anchors": {"num_anchors": 2 * anchors, "batch_size": max(1, batch // 2)},
        "draft-ramp": {"draft_ramp": max(1, settings.iters // 4)},
        "no-lcm": WITHOUT["no-lcm"],
        "no-base": {"base_weight": 0.0},
        "no-sampler": WITHOUT["no-sampler"],
        "no-ema": {"ema": 0.0},
        "ema-0.98": {"ema": 0.98},
        "ema-0.999": {"ema": 0.999},
    }
    return {name: dataclasses.replace(settings, **change) for name, change in changes.items()}


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
@option(
    "--suite",
    type=click.Choice((FIGURES, RECIPE)),
    default=FIGURES,
    help="Runs to train: those of the figures, or those behind the defaults.",
)
@option("--seeds", type=ListOf(int, min=0), help="Seeds of each run, in place of --seed.")
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
    is_recipe = options["suite"] == RECIPE
    runs = recipe_variants(shared) if is_recipe else variants(shared, options["ranks"])
    if unknown := set(options["only"]) - set(runs):
        raise ValueError(f"no run is named {sorted(unknown)[0]}; there are {', '.join(runs)}")
    chosen = [*([CONTROL] if is_recipe else []), *options["only"]] if options["only"] else runs
    seeds = options["seeds"] or (shared.seed,)
    runs = {  # all variants of a seed before the next one
        (name, seed): dataclasses.replace(runs[name], seed=seed)
        for seed in seeds
        for name in dict.fromkeys(chosen)
    }
    records = read_data(options["data"])[: options["num_records"]]
    output, finished = options["output"].expanduser(), 0
    folders = {
        (name, seed): output / (name if len(seeds) == 1 else f"{name}-seed-{seed}")
        for name, seed in runs
    }
    for key, settings in runs.items():
        if should_stop():
            break
        finished += train_variant(
            settings,
            folders[key],
            model_name=options["model"],
            records=records,
            held_out=options["held_out"],
            should_stop=should_stop,
        )
    result = {
        "settings": shared.to_dict(),
        "num_records": len(records),
        "runs": {folder.name: _last_evaluation(folder) for folder in folders.values()},
        "finished": finished == len(runs),
    }
    if is_recipe and result["finished"]:
        result |= _compare(options, runs, folders, records)
    if not is_recipe:
        shown = (f"--run {shlex.quote(f'{path.name}={path}')}" for path in folders.values())
        result["figures"] = " ".join(shown)
    return result | machine_info()


def _compare(
    options: Mapping[str, Any],
    runs: Mapping[tuple[str, int], TrainSettings],
    folders: Mapping[tuple[str, int], Path],
    records: Sequence[Any],
) -> dict[str, Any]:
    """Evaluate the last weights of all runs on the texts that none has evaluated; write the table.

    Of raw and averaged weights, a run counts with those that were better in its last evaluation.
    """
    results: dict[str, list[TextSteps]] = {}
    for key, settings in runs.items():
        values = _text_steps(options, folders[key], settings, records)
        results.setdefault(key[0], []).append(values)
    text = table(results, control=CONTROL)
    write_atomically(options["output"].expanduser() / COMPARISON, text)
    print(text, file=sys.stderr)
    found = {
        name: dataclasses.asdict(difference(steps, results[CONTROL]))
        for name, steps in results.items()
        if name != CONTROL
    }
    return {
        "tokens_per_step": {
            name: [round(run.tokens_per_step, 4) for run in steps]
            for name, steps in results.items()
        },
        "differences": found,
        "num_texts": len(results[CONTROL][0].tokens),
    }


def _text_steps(
    options: Mapping[str, Any], folder: Path, settings: TrainSettings, records: Sequence[Any]
) -> TextSteps:
    """Evaluate a run, or read what was found before."""
    from mlx_mtp.loading import load
    from mlx_mtp.train.gradient.adapter import new_adapter, trainable
    from mlx_mtp.train.gradient.step import StepGradient
    from mlx_mtp.train.run.checkpoint import WEIGHTS, newest_state, under

    path = folder / "text-steps.json"
    model, tokenizer = load(options["model"], mtp=False, kernels=False)
    room = room_for(model, settings.max_seq_length, settings.num_draft_tokens)
    data = prepare(records, tokenizer, max_seq_length=room, held_out=options["held_out"])
    texts = data.held_out[settings.val_batches :] if settings.val_batches > 0 else []
    if len(texts) < 2:
        raise ValueError(
            f"{len(data.held_out)} texts are held out, of which the runs evaluate "
            f"{settings.val_batches}: lower --val-batches or raise --held-out"
        )
    key = {"data_hash": data.data_hash, "texts": len(texts), "step": settings.iters}
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["key"] == key:
            return TextSteps(np.array(saved["tokens"]), np.array(saved["steps"]))
    state = newest_state(RunFolder(folder).training)
    if state is None:
        raise ValueError(f"{folder} has no checkpoint to evaluate")
    model = new_adapter(model, settings)
    weights = evaluations(RunFolder(folder))[-1].get("weights", "raw")
    parameters = under(WEIGHTS[weights], state.tensors)
    if set(parameters) != set(trainable(model)):
        raise ValueError(f"{folder} has a checkpoint of another adapter")
    StepGradient(model, settings).load(parameters)
    found = text_steps(model, texts, rows_per_forward=settings.rows_per_forward)
    values = {"key": key, "tokens": found.tokens.tolist(), "steps": found.steps.tolist()}
    write_atomically(path, json.dumps(values) + "\n")
    return found


def _last_evaluation(folder: Path) -> dict[str, Any]:
    """The last evaluation of a run, without its acceptance by position."""
    keys = ("step", "tokens_per_step", "next_token_loss")
    return {key: record[key] for record in evaluations(RunFolder(folder))[-1:] for key in keys}


if __name__ == "__main__":
    main()
