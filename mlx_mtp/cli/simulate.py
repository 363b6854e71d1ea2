"""The command ``mlx-mtp simulate``: what to expect on machines known by their costs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.terminal import Progress

if TYPE_CHECKING:
    from mlx_mtp.simulate.chips import Machine
    from mlx_mtp.simulate.trace import Trace

_TIMED_TOKENS = 6000  # for --time-planner, so that what comes once does not weigh too much
_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--chip", "chip_names", multiple=True, help="A chip of --list; repeatable.")
@click.option("--curve", type=_FILE, help="A curve that mlx-mtp tune --json printed.")
@click.option("--here", is_flag=True, help="The curve that is kept for this machine and model.")
@click.option("--trace", type=_FILE, help="A recorded trace; the shipped one by default.")
@click.option("--k", type=click.IntRange(1), help="Drafts per step; as many as were recorded.")
@click.option("--kinds", help="Kinds of text, with commas; all by default.")
@click.option("--plain-tps", type=float, help="Plain tokens a second, if you know them.")
@click.option("--by-kind", is_flag=True, help="Tell each kind of text.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--picture", type=_FILE, help="Draw the speeds into a PNG file.")
@click.option("--list", "list_chips", is_flag=True, help="List the chips with their sources.")
@click.option("--time-planner", is_flag=True, help="Measure what the planner itself takes.")
@click.option("--record", type=_FILE, help="Record a trace into a file instead.")
@click.option("--prompts", default="builtin", show_default=True, help="For --record; or a JSONL.")
@click.option("--texts", type=_FILE, help="For --record: file to keep the answers in.")
@click.option("--every", default=1, show_default=True, help="For --record: every n-th prompt.")
@click.option("--max-tokens", default=64, show_default=True, help="For --record: of an answer.")
@click.option("--model", help="For --record and --here; the embedded model by default.")
@click.option("--adapter-path", help="For --record and --here: adapter folder or hub id.")
def simulate(**options: Any) -> None:
    """Replay recorded drafts at what rows cost on other machines.

    Nothing is measured on these machines: published costs of rows and a trace of which drafts hold
    give what plain, linear, quadratic and auto would do. docs/simulate.md has what is assumed.
    """
    if options["every"] < 1:
        raise ValueError(f"--every must be at least 1, got {options['every']}")
    if options["list_chips"]:
        from mlx_mtp.simulate.report import list_lines

        click.echo("\n".join(list_lines()))
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
        trace = trace.of_kind(each.strip() for each in options["kinds"].split(","))
    k = options["k"] or trace.num_draft_tokens
    with Progress("Simulating ...") as progress:
        machines = _machines(options, k)
        if options["time_planner"]:
            lines = _planner_times(trace.limited(k), machines)
            progress.stop()
            click.echo("\n".join(lines))
            return
        found = [
            simulate_on(trace, each, num_draft_tokens=k, progress=progress.say) for each in machines
        ]
    if options["picture"]:
        draw(found, options["picture"])
    if options["as_json"]:
        about = {"about": HEAD, "trace": trace.source, "k": k}
        click.echo(json.dumps(about | {"machines": [each.to_dict() for each in found]}))
        return
    click.echo("\n".join(report_lines(found, trace.limited(k), by_kind=options["by_kind"])))


def _machines(options: dict[str, Any], k: int) -> list[Machine]:
    """The machines that the options name; all chips by default."""
    from mlx_mtp.simulate.chips import chip_named, chips, machine_of_curve

    names = options["chip_names"] or ()
    if not names and not options["curve"] and not options["here"]:
        names = tuple(chips())
    found = [chip_named(name).machine(k) for name in names]
    if options["curve"]:
        found.append(machine_of_curve(options["curve"].stem, _read_curve(options["curve"])))
    if options["here"]:
        found.append(machine_of_curve("here", _kept_curve(options)))
    if options["plain_tps"] is not None:
        found = [each.scaled_to(options["plain_tps"]) for each in found]
    return found


def _read_curve(path: Path) -> Any:
    """The curve in a file of ``mlx-mtp tune --json``."""
    from mlx_mtp.planning.costs import CostCurve

    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a cost curve")
        return CostCurve.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _kept_curve(options: dict[str, Any]) -> Any:
    """What is kept for this machine, model and versions; another's is ignored."""
    from mlx_mtp.calibration.stored_costs import kept_costs
    from mlx_mtp.loading import load

    model, _ = load(options["model"], adapter_path=options["adapter_path"])
    curve = kept_costs(model, measure=False)
    if curve is None:
        raise ValueError(
            f"no costs are kept for {model.name} on this machine with these versions; "
            "mlx-mtp tune measures them"
        )
    return curve


def _planner_times(trace: Trace, machines: list[Machine]) -> list[str]:
    """Processor time of the planner on each machine."""
    from mlx_mtp.simulate.planner_time import planner_us

    tokens = sum(each.num_tokens for each in trace.answers)
    passes = max(2, -(-_TIMED_TOKENS // tokens))
    lines = ["planner, microseconds of processor time a step: p50, p99, mean"]
    for each in machines:
        times = sorted(planner_us(trace, each, passes=passes))
        p50, p99 = times[len(times) // 2], times[int(0.99 * len(times))]
        mean = sum(times) / len(times)
        lines.append(f"{each.name:<20}{p50:8.1f}{p99:8.1f}{mean:8.1f}  ({len(times)} steps)")
    return lines


def _record(options: dict[str, Any]) -> None:
    """Answer prompts greedily, or take the answers of a file, and count the drafts that hold."""
    from mlx_mtp.bench.contexts import prompt_ids
    from mlx_mtp.evaluation.acceptance import checked_num_masks
    from mlx_mtp.evaluation.greedy_texts import greedy_texts
    from mlx_mtp.evaluation.prompt_sets import prompts_of
    from mlx_mtp.evaluation.prompts import KINDS
    from mlx_mtp.loading import load
    from mlx_mtp.simulate.trace import record, write_trace

    chosen = prompts_of(options["prompts"], builtin_kinds=KINDS)[:: options["every"]]
    with Progress("Loading the model ...") as progress:
        model, tokenizer = load(options["model"], adapter_path=options["adapter_path"])
        checked_num_masks(model, None)  # before the slow part
        texts = greedy_texts(
            model,
            tokenizer,
            chosen,
            encode=prompt_ids,
            max_tokens=options["max_tokens"],
            path=options["texts"],
            progress=lambda done, wanted: progress.say(f"Answered {done}/{wanted}"),
        )
        trace = record(
            model,
            texts,
            max_tokens=options["max_tokens"],
            source=f"{model.name}, {options['adapter_path'] or 'its own adapter'}, "
            f"prompts {options['prompts']}",
            progress=lambda done, wanted: progress.say(f"Recorded {done}/{wanted}"),
        )
    write_trace(trace, options["record"])
    click.echo(f"{options['record']}: {len(trace.answers)} answers of {trace.source}")
