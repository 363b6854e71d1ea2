"""Several answers at once, batched or one by one: ``python -m mlx_mtp.lab.sharing``.

Every round generates the same answers in each way, one way after the other, in an order that
rotates with the rounds.  The clock starts after the first step of every answer, so prompts do not
count.  Answers that differ from those of the first way are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.calibration.stored_costs import calibrate, speculation_for
from mlx_mtp.cli.options import ADAPTER_PATH, MODEL, ListOf, option
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.grouping import StepGrouper
from mlx_mtp.decoding.outcome import Outcome
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import Step
from mlx_mtp.decoding.step import run as run_steps
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import LAYOUTS
from mlx_mtp.terminal import Status


@dataclass(frozen=True)
class Run:
    """Some answers generated at once.

    Attributes:
        ids: ids of each answer.
        tokens: number of tokens of all answers after their first steps.
        seconds: time that these took.
    """

    ids: list[list[int]]
    tokens: int
    seconds: float

    @property
    def tps(self) -> float:
        """Tokens per second of all answers together."""
        return self.tokens / self.seconds


Turn = Callable[[list[Step]], list[Outcome]]


def answer_all(requests: Sequence[Request], turn: Turn) -> Run:
    """Generate answers; every turn has one step of each unfinished answer.

    Args:
        requests: new requests.
        turn: runs the steps of a turn.
    """
    ids = [_first_step(request, turn) for request in requests]
    first = sum(map(len, ids))
    start = time.perf_counter()
    while running := [i for i, request in enumerate(requests) if not request.finished]:
        outcomes = turn([requests[i].plan() for i in running])
        for i, outcome in zip(running, outcomes, strict=True):
            ids[i] += requests[i].commit(outcome).tokens
    return Run(ids, sum(map(len, ids)) - first, time.perf_counter() - start)


def _first_step(request: Request, turn: Turn) -> list[int]:
    """Run the prefill and the first step."""
    tokens: list[int] = []
    while not tokens:
        tokens = request.commit(turn([request.plan()])[0]).tokens
    return list(tokens)


def run_turn(
    model: MTPModel, steps: Sequence[Step], *, grouper: StepGrouper | None
) -> list[Outcome]:
    """Run each step in its own forward, or in batches where the grouper expects less time."""
    groups = grouper.groups(steps) if grouper else [[i] for i in range(len(steps))]
    outcomes: dict[int, Outcome] = {}
    for group in groups:
        outcomes |= zip(group, run_steps(model, [steps[i] for i in group]), strict=True)
    return [outcomes[i] for i in range(len(steps))]


def measure(
    model: MTPModel,
    prompts: Sequence[list[int]],
    *,
    layouts: Sequence[str],
    max_tokens: int,
    rounds: int,
    on_status: Callable[[str], None],
) -> dict[str, list[Run]]:
    """Generate the answers in each way ``rounds`` times; runs by ``layout way``.

    Args:
        model: the model.
        prompts: ids of each prompt.
        layouts: layouts of decoding, which are run one by one and batched.
        max_tokens: length of each answer; nothing else ends one.
        rounds: number of repetitions.
        on_status: called with a line of text about the current work.
    """
    calibrate(model, on_status=on_status)
    known = speculation_for(model)
    ways: dict[str, Turn] = {
        "by turns": partial(run_turn, model, grouper=None),
        "shared": partial(run_turn, model, grouper=StepGrouper(model, known)),
    }
    pairs = list(product(layouts, ways))
    runs: dict[str, list[Run]] = {f"{layout} {way}": [] for layout, way in pairs}
    for turn in range(rounds):
        first = turn % len(pairs)
        for layout, way in pairs[first:] + pairs[:first]:
            on_status(f"{len(prompts)} answers, round {turn + 1}/{rounds}: {layout} {way}")
            known.sharers = 1
            config = GenerationConfig(max_tokens=max_tokens, layout=layout)
            requests = [make_request(model, ids, config, speculation=known) for ids in prompts]
            runs[f"{layout} {way}"].append(answer_all(requests, ways[way]))
    return runs


def summarise(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Medians of each way, and how many of its answers differ from those of the first way."""
    base = next(iter(runs.values()))
    return {
        way: {
            "tps": round(median(run.tps for run in group), 2),
            "speedup": round(
                median(run.tps / other.tps for run, other in zip(group, base, strict=True)), 3
            ),
            "different": sum(
                ids != expected
                for run in group
                for ids, expected in zip(run.ids, base[0].ids, strict=True)
            ),
        }
        for way, group in runs.items()
    }


def _encoded(tokenizer: TokenizerWrapper, count: int) -> list[list[int]]:
    """Built-in prompts of all kinds, as ids."""
    prompts = builtin_prompts()
    chosen = [prompts[index * len(prompts) // count] for index in range(count)]
    return [prompt_ids(tokenizer, prompt.text) for prompt in chosen]


@command
@MODEL
@ADAPTER_PATH
@option("--answers", type=ListOf(int, min=1), default="1,2,4,8", help="Numbers of answers at once.")
@option("--layouts", type=ListOf(str), default="plain,auto", help="Layouts; the first is the base.")
@option("--max-tokens", default=32, help="Number of tokens per answer.")
@option("--rounds", default=3, help="Number of repetitions.")
def main(
    *,
    model: str | None,
    adapter_path: str | None,
    answers: Sequence[int],
    layouts: Sequence[str],
    max_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Measure the gain of batched forwards by number of answers generated at once."""
    from mlx_mtp.loading import load

    if unknown := set(layouts) - set(LAYOUTS):
        raise ValueError(f"layouts must be some of {', '.join(LAYOUTS)}, got {min(unknown)!r}")
    if max(answers) > len(builtin_prompts()):
        raise ValueError(f"answers must be at most {len(builtin_prompts())}, got {max(answers)}")
    loaded, tokenizer = load(model, adapter_path=adapter_path)
    results = {}
    for count in answers:
        with Status("Measuring ...", delay_s=0) as status:
            runs = measure(
                loaded, _encoded(tokenizer, count), layouts=layouts, max_tokens=max_tokens,
                rounds=rounds, on_status=status.update,
            )  # fmt: skip
        results[count] = summarise(runs)
        for way, result in results[count].items():
            print(
                f"{count} answers, {way:<18} {result['tps']:8.1f} tokens/s  "
                f"{result['speedup']:.2f} x  {result['different']} different",
                flush=True,
            )
    return {"answers": results, "max_tokens": max_tokens, "rounds": rounds} | machine_info()


if __name__ == "__main__":
    main()
