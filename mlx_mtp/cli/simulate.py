"""The command ``mlx-mtp simulate``: expected speeds on machines of known step costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from mlx_mtp.cli.options import (
    AS_JSON,
    KINDS_OPTION,
    PROMPTS,
    all_prompts,
    field_option,
    model_options,
    num_prompts,
    option,
)
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.terminal import Status, show

if TYPE_CHECKING:
    from mlx_mtp.simulate.chips import Machine

FILE = click.Path(path_type=Path)


@cloup.command()
@cloup.option_group(
    "Machines",
    option(
        "--chip",
        "chip_names",
        multiple=True,
        metavar="NAME",
        help="Chip to simulate, one of --list; repeatable.",
        show_default="all",
    ),
    option(
        "--costs",
        former_names=("--curve",),
        type=FILE,
        help="Step costs of another machine, printed by mlx-mtp tune --json.",
    ),
    option(
        "--here",
        is_flag=True,
        help="Use the step costs stored for this machine and model.",
    ),
    option(
        "--plain-tps",
        type=float,
        help="Scale the machines to this number of tokens per second of plain decoding.",
    ),
    option(
        "--list",
        "list_chips",
        is_flag=True,
        help="List the chips with their sources.",
    ),
)
@cloup.option_group(
    "Trace",
    option(
        "--trace",
        type=FILE,
        help="Trace of accepted drafts to replay.",
        show_default="the included trace",
    ),
    option(
        "--num-draft-tokens",
        former_names=("--k",),
        type=click.IntRange(1),
        help="Draft tokens per step; the trace's maximum by default.",
    ),
    KINDS_OPTION,
)
@cloup.option_group(
    "Recording a trace",
    option("--record", type=FILE, help="Record a trace into this file."),
    PROMPTS,
    num_prompts("all"),
    option("--every", type=click.IntRange(1), default=1, hidden=True, help="Use every n-th."),
    field_option(
        GenerationConfig,
        "max_tokens",
        "-m",
        type=click.IntRange(1),
        default=64,
        help="Maximum number of tokens to generate per prompt.",
    ),
    option(
        "--texts",
        type=FILE,
        help="Read answers from this JSONL file, and append missing ones.",
    ),
)
@model_options()
@cloup.option_group(
    "Output",
    option(
        "--by-kind",
        is_flag=True,
        help="Print results for each kind of text.",
    ),
    AS_JSON,
    option(
        "--plot",
        former_names=("--picture",),
        type=FILE,
        help="Write a plot of the results to this PNG file.",
    ),
)
def simulate(**options: Any) -> None:
    """Simulate the speed on other machines from published step costs.

    Nothing is measured on these machines. A recorded trace of accepted drafts is replayed with the
    costs of each machine in every layout. docs/simulate.md lists the assumptions.
    """
    if options["list_chips"]:
        from mlx_mtp.simulate.report import list_lines

        show("\n".join(list_lines()))
    elif options["record"]:
        _record(options)
    else:
        _simulate(options)


def _simulate(options: dict[str, Any]) -> None:
    from mlx_mtp.simulate.report import HEAD, draw, report_lines
    from mlx_mtp.simulate.simulation import simulate as simulate_on
    from mlx_mtp.simulate.trace import read_trace

    trace = read_trace(options["trace"])
    if options["kinds"]:
        trace = trace.of_kind(options["kinds"])
    k = options["num_draft_tokens"] or trace.num_draft_tokens
    with Status("Simulating ...") as status:
        machines = _machines(options, k)
        results = [
            simulate_on(trace, machine, num_draft_tokens=k, on_status=status.update)
            for machine in machines
        ]
    if options["plot"]:
        draw(results, options["plot"])
    if options["as_json"]:
        about = {"about": HEAD, "trace": trace.source, "k": k}
        show(json.dumps(about | {"machines": [result.to_dict() for result in results]}))
        return
    show("\n".join(report_lines(results, trace.limited(k), by_kind=options["by_kind"])))


def _machines(options: dict[str, Any], k: int) -> list[Machine]:
    """The machines that the options name; all chips by default."""
    from mlx_mtp.simulate.chips import chip_named, chips, machine_of_curve

    names = options["chip_names"] or ()
    if not names and not options["costs"] and not options["here"]:
        names = tuple(chips())
    machines = [chip_named(name).machine(k) for name in names]
    if options["costs"]:
        machines.append(machine_of_curve(options["costs"].stem, _read_costs(options["costs"])))
    if options["here"]:
        machines.append(machine_of_curve("here", _stored_costs(options)))
    if options["plain_tps"] is not None:
        machines = [machine.scaled_to(options["plain_tps"]) for machine in machines]
    return machines


def _read_costs(path: Path) -> Any:
    """The costs in a file of ``mlx-mtp tune --json``."""
    from mlx_mtp.planning.costs import CostCurve

    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a cost curve")
        return CostCurve.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _stored_costs(options: dict[str, Any]) -> Any:
    """The costs stored for this machine, model and versions."""
    from mlx_mtp.calibration.stored_costs import measured_costs
    from mlx_mtp.loading import load

    model, _ = load(
        options["model"],
        adapter_path=options["adapter_path"],
        trust_remote_code=options["trust_remote_code"],
    )
    curve = measured_costs(model)
    if curve is None:
        raise ValueError(
            f"no step costs are stored for {model.name} on this machine with these versions; "
            "run mlx-mtp tune"
        )
    return curve


def _record(options: dict[str, Any]) -> None:
    """Answer prompts greedily, or read the answers of a file, and count the accepted drafts."""
    from mlx_mtp.bench.contexts import prompt_ids
    from mlx_mtp.evaluation.acceptance import checked_num_masks
    from mlx_mtp.evaluation.greedy_texts import greedy_texts
    from mlx_mtp.evaluation.prompt_sets import spread
    from mlx_mtp.loading import load
    from mlx_mtp.simulate.trace import record, write_trace

    prompts = spread(all_prompts(options["prompts"]), options["num_prompts"])[:: options["every"]]
    with Status("Loading the model ...") as status:
        model, tokenizer = load(
            options["model"],
            adapter_path=options["adapter_path"],
            trust_remote_code=options["trust_remote_code"],
        )
        checked_num_masks(model, None)  # before the slow part
        if model.heads is not None:
            raise ValueError(
                f"{options['adapter_path']} has heads, and simulate replays mask tokens; "
                "python -m mlx_mtp.lab.heads compares both"
            )
        texts = greedy_texts(
            model,
            tokenizer,
            prompts,
            encode=prompt_ids,
            max_tokens=options["max_tokens"],
            path=options["texts"],
            progress=lambda done, total: status.update(f"Answered {done}/{total}"),
        )
        trace = record(
            model,
            texts,
            max_tokens=options["max_tokens"],
            source=f"{model.name}, {options['adapter_path'] or 'its own adapter'}, "
            f"prompts {options['prompts']}",
            progress=lambda done, total: status.update(f"Recorded {done}/{total}"),
        )
    write_trace(trace, options["record"])
    show(f"{options['record']}: {len(trace.answers)} answers of {trace.source}")
