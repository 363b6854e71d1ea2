"""Several answers at once, in shared forwards or by turns: ``python -m mlx_mtp.lab.sharing``.

Every round makes the same answers in each way, one way after the other, in an order that moves on
with the rounds.  The clock runs behind the first step of every answer, so prompts do not count.
Answers that are not the same in every way are counted.  The last line is one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import click
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.calibration.stored_costs import calibrate, speculation_for
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.grouping import StepGrouper
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import Outcome, Step
from mlx_mtp.decoding.step import run as run_steps
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.lab.tokens_per_step import stamp
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import LAYOUTS
from mlx_mtp.terminal import BadInput, Status, one_line


@dataclass(frozen=True)
class Run:
    """Some answers made at once.

    Attributes:
        ids: of each answer.
        tokens: of all answers behind their first steps.
        seconds: they took.
    """

    ids: list[list[int]]
    tokens: int
    seconds: float

    @property
    def tps(self) -> float:
        """Tokens of all answers a second."""
        return self.tokens / self.seconds


Turn = Callable[[list[Step]], list[Outcome]]


def answer_all(requests: Sequence[Request], run_turn: Turn) -> Run:
    """Make answers, a step of each in every turn.

    Args:
        requests: the answers, not begun.
        run_turn: runs the steps of a turn.
    """
    ids = [_first_step(one, run_turn) for one in requests]
    first = sum(map(len, ids))
    began = time.perf_counter()
    while going := [i for i, one in enumerate(requests) if not one.finished]:
        outcomes = run_turn([requests[i].plan() for i in going])
        for i, outcome in zip(going, outcomes, strict=True):
            ids[i] += requests[i].commit(outcome).tokens
    return Run(ids, sum(map(len, ids)) - first, time.perf_counter() - began)


def _first_step(request: Request, run_turn: Turn) -> list[int]:
    """Prefill, and the first step."""
    tokens: list[int] = []
    while not tokens:
        tokens = request.commit(run_turn([request.plan()])[0]).tokens
    return list(tokens)


def one_by_one(model: MTPModel, steps: Sequence[Step]) -> list[Outcome]:
    """Run each step in a forward of its own."""
    return [run_steps(model, [step])[0] for step in steps]


def grouped(model: MTPModel, grouper: StepGrouper, steps: Sequence[Step]) -> list[Outcome]:
    """Run steps in batches where that costs less."""
    outcomes: dict[int, Outcome] = {}
    for group in grouper.groups(steps):
        outcomes |= zip(group, run_steps(model, [steps[i] for i in group]), strict=True)
    return [outcomes[i] for i in range(len(steps))]


def measure(
    model: MTPModel,
    prompts: Sequence[list[int]],
    *,
    layouts: Sequence[str],
    max_tokens: int,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, list[Run]]:
    """Make the answers in each way, again and again; runs by ``layout way``.

    Args:
        model: the model.
        prompts: ids of each prompt.
        layouts: of decoding; each is made by turns and shared.
        max_tokens: of each answer; nothing else ends one.
        rounds: how often.
        say: told what is going on.
    """
    calibrate(model, on_status=say)
    known = speculation_for(model)
    grouper = StepGrouper(model, known)
    ways: dict[str, Turn] = {
        "by turns": partial(one_by_one, model),
        "shared": partial(grouped, model, grouper),
    }
    pairs = list(product(layouts, ways))
    runs: dict[str, list[Run]] = {f"{layout} {way}": [] for layout, way in pairs}
    for at in range(rounds):
        for layout, way in pairs[at % len(pairs) :] + pairs[: at % len(pairs)]:
            say(f"{len(prompts)} answers, round {at + 1}/{rounds}: {layout} {way}")
            known.sharers = 1
            config = GenerationConfig(max_tokens=max_tokens, layout=layout)
            requests = [make_request(model, ids, config, speculation=known) for ids in prompts]
            runs[f"{layout} {way}"].append(answer_all(requests, ways[way]))
    return runs


def summarise(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Medians of each way, and how often its answers were others than those of the first."""
    first = next(iter(runs.values()))[0]
    base = [run.tps for run in next(iter(runs.values()))]
    return {
        way: {
            "tps": round(median(run.tps for run in each), 2),
            "speedup": round(median(run.tps / tps for run, tps in zip(each, base, strict=True)), 3),
            "different": sum(
                one != other for run in each for one, other in zip(run.ids, first.ids, strict=True)
            ),
        }
        for way, each in runs.items()
    }


def _encoded(tokenizer: TokenizerWrapper, count: int) -> list[list[int]]:
    """Built-in prompts of all kinds, as ids."""
    prompts = builtin_prompts()
    chosen = [prompts[at * len(prompts) // count] for at in range(count)]
    texts = [chat_text(tokenizer, [{"role": "user", "content": each.text}]) for each in chosen]
    return [encode_prompt(tokenizer, text, add_special_tokens=False) for text in texts]


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", help="Adapter folder or hub id.")
@click.option("--answers", default="1,2,4,8", show_default=True, help="How many at once.")
@click.option("--layouts", default="plain,auto", show_default=True, help="The first is the base.")
@click.option("--max-tokens", default=32, show_default=True, help="Tokens of each answer.")
@click.option("--rounds", default=3, show_default=True)
def main(**options: Any) -> None:
    """Measure what sharing forwards brings, by how many answers are made at once."""
    try:
        run(**options)
    except ValueError as error:
        raise BadInput(one_line(error)) from None


def run(
    *,
    model: str | None,
    adapter_path: str | None,
    answers: str,
    layouts: str,
    max_tokens: int,
    rounds: int,
) -> None:
    """Do what the options say; see ``main``."""
    from mlx_mtp.loading import load

    names = layouts.split(",")
    for name in names:
        if name not in LAYOUTS:
            raise ValueError(f"layouts must be some of {', '.join(LAYOUTS)}, got {name!r}")
    counts = [int(each) if each.isdecimal() else 0 for each in answers.split(",")]
    if min(counts) < 1 or max(counts) > len(builtin_prompts()):
        raise ValueError(f"answers must be numbers from 1 to {len(builtin_prompts())}: {answers!r}")
    loaded, tokenizer = load(model, adapter_path=adapter_path)
    results = {}
    for count in counts:
        with Status("Measuring ...", delay_s=0) as line:
            runs = measure(
                loaded, _encoded(tokenizer, count), layouts=names, max_tokens=max_tokens,
                rounds=rounds, say=line.update,
            )  # fmt: skip
        results[count] = summarise(runs)
        for way, found in results[count].items():
            print(
                f"{count} answers, {way:<18} {found['tps']:8.1f} tokens/s  {found['speedup']:.2f} x"
                f"  {found['different']} different", file=sys.stdout, flush=True,
            )  # fmt: skip
    settings = {"max_tokens": max_tokens, "rounds": rounds}
    print(json.dumps({"answers": results} | settings | stamp()))


if __name__ == "__main__":
    main()
