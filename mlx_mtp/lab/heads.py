"""Independent heads against mask tokens: ``python -m mlx_mtp.lab.heads``.

The folders are runs of ``mlx-mtp train`` over the same base model.  The model answers every prompt
greedily once, and the accepted drafts of each run are counted along these answers
(``evaluation.acceptance``).  The same counts are then replayed with the published step costs of
chips: masks in the best fixed layout and in ``auto``, heads with the best fixed number of drafts,
whose rows are the drafts alone.

A chip's costs are those of a model of its own (``simulate/chips.json``), and heads of that model's
size are assumed, in float16.  Proposing reads their weights and the unembedding once:

    bytes = d * (w D^2 * 2) + 4.5/8 * V D,   w = 1 (mlp) or 12 (layer)

for d drafts, with dispatches as ``chips.json`` assumes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_mtp.bench.interval import ratio_interval
from mlx_mtp.cli.options import option
from mlx_mtp.drafting.hidden_rows import relative_cost
from mlx_mtp.evaluation.acceptance import walk
from mlx_mtp.evaluation.greedy_texts import GreedyText, texts_hash
from mlx_mtp.lab.commands import answer_prompts, command, counting, machine_info, text_options
from mlx_mtp.model.config import HeadsConfig
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.planning.plan import HEADS, Plan
from mlx_mtp.simulate.chips import Chip, chips
from mlx_mtp.simulate.replay import Replay, StepCosts, replay
from mlx_mtp.simulate.simulation import replay_auto
from mlx_mtp.simulate.trace import Trace, record
from mlx_mtp.storage.contents import ADAPTER_WEIGHTS
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.storage.safetensors import check_safetensors
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.run.history import read_history

_HEAD_BYTES = 2  # of a number in a head
_UNEMBEDDING_BYTES = 4.5 / 8
_MATRICES = {"mlp": 1.0, "layer": 12.0}  # of D x D numbers in a head
_DISPATCHES = {"mlp": 4, "layer": 16}  # of a head
_SIZES = re.compile(r"hidden (\d+),.* vocabulary (\d+)k")


@dataclass(frozen=True)
class Candidate:
    """A trained adapter and what was counted with it.

    Attributes:
        name: its column.
        head: kind of its heads; None for mask tokens.
        trace: accepted drafts along the answers.
        num_steps: number of training steps.
        seconds: duration of the training steps.
        num_parameters: trained numbers.
        num_bytes: of the weights file.
        relative: estimated cost of proposing, in plain steps of the model that was trained.
    """

    name: str
    head: str | None
    trace: Trace
    num_steps: int
    seconds: float
    num_parameters: int
    num_bytes: int
    relative: float

    def steps(self, layout: str) -> np.ndarray:
        """Tokens and steps of each answer with all drafts at each step, ``[n, 2]``."""
        k = self.trace.num_draft_tokens
        return np.array(
            [
                (
                    answer.num_tokens,
                    walk(
                        answer.counts,
                        first=0,
                        last=answer.num_tokens - 1,
                        num_draft_tokens=k,
                        layout=layout,
                    ),
                )
                for answer in self.trace.answers
            ],
            dtype=float,
        )


class HeadsPlanner:
    """Plans steps that verify the same number of drafts without mask rows, after the prompt's.

    Args:
        num_drafts: maximum drafts per step.
    """

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts
        self._has_row = False

    def plan(self, *, num_pending: int, room: int, **_: Any) -> Plan:
        """Plan one step; ``AutoPlanner.plan`` has the arguments."""
        count = min(self._num_drafts, room - 1) if self._has_row else 0
        self._has_row = True
        return Plan(StepLayout(num_pending, count, (0,) * (count + 1)), source=HEADS)

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


class HeadsCosts(StepCosts):
    """Durations of steps that verify drafts of heads, with the time to propose them."""

    def __init__(self, chip: Chip, candidate: Candidate) -> None:
        k = candidate.trace.num_draft_tokens
        super().__init__(chip.machine(k).curve, max_rows=k + 1)
        self._propose_ms = [propose_ms(chip, candidate, count) for count in range(k + 1)]

    def ms(self, rows: int, largest: int, context: int) -> float:
        """Milliseconds of a step of that many rows."""
        del largest
        return self.forward_ms(context)[rows] + self._propose_ms[rows - 1]


def propose_ms(chip: Chip, candidate: Candidate, count: int) -> float:
    """Milliseconds to propose drafts by heads of the size of the chip's model.

    Args:
        chip: must have a model, or the durations of whole steps of the default model.
        candidate: says of which kind the heads are.
        count: number of drafts.
    """
    if count == 0:
        return 0.0
    if not chip.model:
        assert chip.one_row_ms is not None
        return chip.one_row_ms * candidate.relative * count / candidate.trace.num_draft_tokens
    assert candidate.head is not None
    match = _SIZES.search(chip.sizes["what"])
    assert match is not None
    width, vocabulary = int(match[1]), 1000 * int(match[2])
    num_bytes = count * _MATRICES[candidate.head] * width**2 * _HEAD_BYTES
    num_bytes += vocabulary * width * _UNEMBEDDING_BYTES
    dispatches = count * _DISPATCHES[candidate.head] + chip.assumed["draft_dispatches"]
    reading = 1e-6 * num_bytes / (chip.bandwidth_gbs * chip.assumed["bandwidth_share"])
    return reading + dispatches * chip.assumed["dispatch_ms"]


@dataclass(frozen=True)
class Speed:
    """Speed on a chip, relative to plain decoding.

    Attributes:
        fixed: of the best fixed layout whose rows have a known cost.
        name: that layout, such as ``quadratic 2`` or ``2 heads``.
        auto: of the planner, for mask tokens.
    """

    fixed: float
    name: str
    auto: float | None = None


def speed_of(candidate: Candidate, chip: Chip) -> Speed:
    """Replay a candidate's trace on a chip."""
    trace, k = candidate.trace, candidate.trace.num_draft_tokens
    machine = chip.machine(k)
    costs = StepCosts(machine.curve, max_rows=(k + 1) ** 2)
    plain = replay(trace, partial(FixedPlanner, "plain", num_draft_tokens=0), costs)
    replays: dict[str, Replay] = {"plain": plain}
    if candidate.head is not None:
        costs = HeadsCosts(chip, candidate)
        for count in range(1, k + 1):
            name = f"{count} head{'s' if count > 1 else ''}"
            replays[name] = replay(trace, partial(HeadsPlanner, count), costs)
    else:
        for layout in ("linear", "quadratic"):
            for size in range(1, k + 1):
                make = partial(FixedPlanner, layout, num_draft_tokens=size)
                replays[f"{layout} {size}"] = replay(trace, make, costs)
    known = {name: done for name, done in replays.items() if done.total.widest <= machine.max_rows}
    name = max(known, key=lambda name: known[name].total.tps)
    base = plain.total.tps
    auto = None if candidate.head else replay_auto(trace, machine, costs).total.tps / base
    return Speed(known[name].total.tps / base, name, auto)


def simulated_chips() -> list[Chip]:
    """Chips for which the cost of heads can be estimated."""
    return [chip for chip in chips().values() if chip.model or chip.one_row_ms is not None]


def table(candidates: list[Candidate]) -> list[str]:
    """Lines of a Markdown table with a column for each candidate."""

    def row(name: str, cells: list[str]) -> str:
        return f"| {' | '.join([name, *cells])} |"

    def with_interval(candidate: Candidate, layout: str) -> str:
        steps = candidate.steps(layout)
        rate = steps[:, 0].sum() / steps[:, 1].sum()
        interval = ratio_interval(steps, np.ones_like(steps), seed=0)
        return f"{rate:.3f}" + ("" if interval is None else " ({:.3f} to {:.3f})".format(*interval))

    def rows_per_step(candidate: Candidate, layout: str) -> str:
        k = candidate.trace.num_draft_tokens
        if candidate.head is not None:
            return str(k + 1)
        return str((k + 1) ** 2 if layout == "quadratic" else 2 * k + 1)

    def rates(candidate: Candidate) -> str:
        return " ".join(f"{100 * rate:.1f}" for rate in candidate.trace.prefix_probs()[1:])

    lines = [row("", [candidate.name for candidate in candidates])]
    lines.append("|---" * (len(candidates) + 1) + "|")
    lines.append(row("training steps", [str(one.num_steps) for one in candidates]))
    lines.append(row("seconds of training steps", [f"{one.seconds:.0f}" for one in candidates]))
    size = "{:.2f} million, {:.1f} MB".format
    sizes = [size(one.num_parameters / 1e6, one.num_bytes / 1e6) for one in candidates]
    lines.append(row("trained numbers, file", sizes))
    for layout in ("quadratic", "linear"):
        cells = [
            with_interval(one, layout) if layout == "quadratic" or one.head is None else ""
            for one in candidates
        ]
        name = "tokens per step, all drafts" if layout == "quadratic" else "with linear masks"
        lines.append(row(name, cells))
    lines.append(row("accepted drafts by position, %", [rates(one) for one in candidates]))
    cells = [rows_per_step(one, "quadratic") for one in candidates]
    lines.append(row("rows of such a step", cells))
    for chip in simulated_chips():
        cells = []
        for candidate in candidates:
            speed = speed_of(candidate, chip)
            auto = "" if speed.auto is None else f"; auto {speed.auto:.2f}"
            cells.append(f"{speed.fixed:.2f} ({speed.name}{auto})")
        lines.append(row(f"simulated speed, {chip.name}", cells))
    return lines


def _candidate(
    name: str, folder: Path, model: str | None, texts: list[GreedyText], max_tokens: int
) -> Candidate:
    from mlx_mtp.loading import load

    run = RunFolder(folder)
    reports = [line for line in read_history(run.history) if line.get("kind") == "report"]
    loaded, _ = load(model, adapter_path=str(folder))
    config = loaded.adapter_config
    with counting(f"Evaluating {name}") as progress:
        trace = record(loaded, texts, max_tokens=max_tokens, progress=progress)
    weights = folder / ADAPTER_WEIGHTS
    return Candidate(
        name=name,
        head=config.head if isinstance(config, HeadsConfig) else None,
        trace=trace,
        num_steps=max((line["step"] for line in reports), default=0),
        seconds=sum(line["seconds"] for line in reports),
        num_parameters=sum(int(np.prod(x.shape)) for x in check_safetensors(weights).values()),
        num_bytes=weights.stat().st_size,
        relative=0.0 if loaded.heads is None else relative_cost(loaded, loaded.heads),
    )


@command
@text_options
@option("--run", multiple=True, required=True, metavar="NAME=FOLDER", help="A run; repeatable.")
@option("--output", type=click.Path(path_type=Path), help="Markdown file to write the table to.")
def main(
    *, model: str | None, run: tuple[str, ...], output: Path | None, **options: Any
) -> dict[str, Any]:
    """Compare runs of heads and of mask tokens."""
    from mlx_mtp.loading import load

    pairs = [text.partition("=")[::2] for text in run]
    if bad := next((text for text in run if "=" not in text), None):
        raise ValueError(f"--run {bad!r} is not NAME=FOLDER")
    loaded, tokenizer = load(model, mtp=False)
    texts = answer_prompts(loaded, tokenizer, **options)
    del loaded
    candidates = [
        _candidate(name, Path(folder), model, texts, options["max_tokens"])
        for name, folder in pairs
    ]
    lines = table(candidates)
    if output is not None:
        write_atomically(output, "\n".join(lines) + "\n")
    print("\n".join(lines))
    first = candidates[0].steps("quadratic")
    return {
        "num_prompts": len(texts),
        "texts": texts_hash(texts),
        "runs": {
            one.name: {
                "tokens_per_step": float(np.divide(*one.steps("quadratic").sum(axis=0))),
                "of_the_first": ratio_interval(one.steps("quadratic"), first, seed=0),
                "accepted": one.trace.prefix_probs()[1:].tolist(),
            }
            for one in candidates
        },
    } | machine_info()


if __name__ == "__main__":
    main()
