"""What lookup alone gains on real answers: ``python -m mlx_mtp.lab.lookup_replay``.

The model answers every prompt greedily once (``--texts FILE`` stores the answers).  The answers are
then replayed in random order: planner and lookup are those of the decoder for a model without an
adapter, and the clock adds up published step costs.  So tokens per step are those of
``mlx-mtp generate --no-adapter`` on a machine with these costs, whatever else this machine does,
and speed-ups are those that the costs give, without the processor time of planning and lookup.  The
last line of the output is one JSON line.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np

from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.cli.options import MODEL, field_option, option
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.drafting.drafter import CommittedStep, Drafts
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.suffix_lookup import SuffixLookup
from mlx_mtp.evaluation.greedy_texts import GreedyText, greedy_texts, texts_hash
from mlx_mtp.evaluation.prompt_sets import spread
from mlx_mtp.evaluation.prompts import BENCHMARK_KINDS, builtin_prompts
from mlx_mtp.lab.commands import command, counting, machine_info
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import CostCurve
from mlx_mtp.simulate.chips import chip_named, chips
from mlx_mtp.simulate.replay import StepCosts, Tally, speculation

_NO_HIDDEN = mx.zeros((0, 0))


def replay_text(text: GreedyText, known: Speculation, costs: StepCosts) -> Tally:
    """Replay one answer step by step.

    Args:
        text: the prompt and its answer.
        known: costs and acceptance, which keep learning.
        costs: durations of steps.
    """
    answer, prompt = text.answer, len(text.prompt)
    planner = AutoPlanner(known, num_draft_tokens=0)
    drafter = LookupDrafter(SuffixLookup(text.prompt), known.lookup)
    tally = Tally(tokens=len(answer))
    emitted = 0
    while emitted < len(answer):
        context = prompt + emitted - 1 if emitted else 0
        room = GenerationConfig.max_tokens - emitted
        plan = planner.plan(
            num_pending=1 if emitted else prompt,
            room=room,
            offers=[drafter.offer(room - 1)],
            context=context,
        )
        rest = answer[emitted:]
        accepted = min(plan.layout.num_draft_tokens, drafter.match.num_right(rest[:-1]))
        tokens, ms = rest[: accepted + 1], 0.0
        if emitted:
            ms = costs.ms(plan.layout.num_rows, 0, context)
            tally.add(Tally(clocked=len(tokens), ms=ms, rows=plan.layout.num_rows))
        planner.observe(plan, last_node=accepted, context=context, ms=ms or np.nan)
        drafter.commit(
            CommittedStep(
                layout=plan.layout, source=plan.source, last_node=accepted, tokens=tokens,
                next_ids=tokens, hidden=_NO_HIDDEN, drafts=Drafts.none(),
            )
        )  # fmt: skip
        emitted += len(tokens)
        tally.steps += 1
    return tally


def replay_texts(
    texts: Sequence[GreedyText], curve: CostCurve, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Tokens per step, after the first, and speed-up over plain steps, by kind of text.

    Args:
        texts: replayed in an order drawn with ``seed``, by one planner that keeps learning.
        curve: costs of steps.
        seed: of the order.
    """
    known, costs = speculation(curve, (), 0), StepCosts(curve)
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    kinds: dict[str, Tally] = {}
    num_answers: dict[str, int] = {}
    plain_ms: dict[str, float] = {}
    for text in shuffled:
        tally = replay_text(text, known, costs)
        kinds.setdefault(text.kind, Tally()).add(tally)
        num_answers[text.kind] = num_answers.get(text.kind, 0) + 1
        middle = len(text.prompt) + len(text.answer) // 2
        ms = tally.clocked * costs.ms(1, 0, middle)
        plain_ms[text.kind] = plain_ms.get(text.kind, 0.0) + ms
    return {
        kind: {
            "tokens_per_step": tally.clocked / max(tally.steps - num_answers[kind], 1),
            "speedup": plain_ms[kind] / tally.ms if tally.ms else 1.0,
        }
        for kind, tally in sorted(kinds.items())
    }


@command
@MODEL
@option("--chip", "names", multiple=True, help="Chip to simulate; repeatable. [default: all]")
@option("--orders", default=3, help="Number of orders of the answers.")
@option("--num-prompts", type=int, help="Number of prompts.", show_default="all")
@field_option(GenerationConfig, "max_tokens", default=96)
@option("--texts", type=click.Path(path_type=Path), help="File that stores the answers.")
def main(
    *,
    model: str | None,
    names: Sequence[str],
    orders: int,
    num_prompts: int | None,
    max_tokens: int,
    texts: Path | None,
) -> dict[str, Any]:
    """Simulate drafts from the text, without an adapter, on greedy answers."""
    from mlx_mtp.loading import load

    machines = {name: chip_named(name).machine(0) for name in names or chips()}
    loaded, tokenizer = load(model, mtp=False)
    prompts = spread(builtin_prompts(BENCHMARK_KINDS), num_prompts)
    with counting("Answering the prompts") as progress:
        answers = greedy_texts(
            loaded, tokenizer, prompts, encode=prompt_ids, max_tokens=max_tokens, path=texts,
            progress=progress,
        )  # fmt: skip
    results: dict[str, dict[str, dict[str, float]]] = {}
    print("tokens per step / speed-up")
    for name, machine in machines.items():
        runs = [replay_texts(answers, machine.curve, seed=seed) for seed in range(orders)]
        results[name] = {
            kind: {key: float(np.mean([run[kind][key] for run in runs])) for key in figures}
            for kind, figures in runs[0].items()
        }
        cells = [
            f"{kind} {figures['tokens_per_step']:.2f}/{figures['speedup']:.2f}"
            for kind, figures in results[name].items()
        ]
        print(f"{name:<16}", "  ".join(cells))
    return {
        "texts": texts_hash(answers),
        "max_tokens": max_tokens,
        "orders": orders,
        "results": results,
    } | machine_info()


if __name__ == "__main__":
    main()
