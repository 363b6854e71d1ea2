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
from itertools import product
from statistics import median
from typing import Any

import click
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.calibration.stored_costs import speculation_for
from mlx_mtp.decoding.loop import Decoding, decode
from mlx_mtp.decoding.sharing import run_together
from mlx_mtp.decoding.step import Step, run_steps
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.lab.tokens_per_step import stamp
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import LAYOUTS
from mlx_mtp.terminal import BadInput, Progress, one_line


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


def answer_all(decodings: Sequence[Decoding], run: Callable[[list[Step]], None]) -> Run:
    """Make answers, a step of each in every turn.

    Args:
        decodings: the answers, not begun.
        run: runs the steps of a turn.
    """
    found = [list(next(each).tokens) for each in decodings]
    first = sum(map(len, found))
    going = [pair for pair in zip(decodings, found, strict=True) if pair[0].planned()]
    began = time.perf_counter()
    while going:
        run([step for each, _ in going if (step := each.planned())])
        for each, ids in going:
            ids += next(each).tokens
        going = [(each, ids) for each, ids in going if each.planned()]
    return Run(found, sum(map(len, found)) - first, time.perf_counter() - began)


def one_by_one(steps: Sequence[Step]) -> None:
    """Run each step in a forward of its own."""
    for step in steps:
        run_steps([step])


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
    known = speculation_for(model)
    ways = {"by turns": one_by_one, "shared": lambda steps: run_together(steps, known)}
    pairs = list(product(layouts, ways))
    runs: dict[str, list[Run]] = {f"{layout} {way}": [] for layout, way in pairs}
    for at in range(rounds):
        for layout, way in pairs[at % len(pairs) :] + pairs[: at % len(pairs)]:
            say(f"{len(prompts)} answers, round {at + 1}/{rounds}: {layout} {way}")
            known.sharers = 1
            options: dict[str, Any] = {"max_tokens": max_tokens, "layout": layout}
            decodings = [decode(model, ids, speculation=known, **options) for ids in prompts]
            runs[f"{layout} {way}"].append(answer_all(decodings, ways[way]))
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
        with Progress("Measuring ...", delay_s=0) as line:
            runs = measure(
                loaded, _encoded(tokenizer, count), layouts=names, max_tokens=max_tokens,
                rounds=rounds, say=line.say,
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
