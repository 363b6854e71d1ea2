"""Tokens per step of one or several adapters: ``python -m mlx_mtp.lab.tokens_per_step``.

The model answers every prompt greedily once.  Each adapter is then evaluated on these texts
(``evaluation.acceptance``), which counts the steps that ``mlx-mtp generate`` would take in a
fraction of the time.  ``--texts FILE`` stores the answers for later runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click

from mlx_mtp.cli.options import AS_JSON, option
from mlx_mtp.drafting.vocabulary import frequent_head
from mlx_mtp.evaluation.acceptance import (
    LAYOUTS,
    Answer,
    Evaluation,
    checked_num_masks,
    count_answers,
    summarise,
)
from mlx_mtp.evaluation.greedy_texts import GreedyText, texts_hash
from mlx_mtp.evaluation.prompts import ENGLISH_KINDS, KINDS
from mlx_mtp.lab.commands import (
    answer_prompts,
    command,
    counting,
    machine_info,
    text_options,
)

DEFAULT_ADAPTER = "default"


def by_kind(texts: Sequence[GreedyText], answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Group counted answers by kind of prompt; ``english`` is all but languages, ``all`` is all."""
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        kinds.setdefault(texts[answer.sequence].kind, []).append(answer)
    if set(kinds) == set(KINDS):
        kinds["english"] = [answer for kind in ENGLISH_KINDS for answer in kinds[kind]]
    if len(kinds) > 1:
        kinds["all"] = list(answers)
    return kinds


def table(results: dict[str, dict[str, Evaluation]]) -> list[str]:
    """Lines of tokens per step by kind and adapter, and acceptance rates by position."""
    labels = {name: name if len(name) <= 24 else f"...{name[-21:]}" for name in results}
    lines = ["tokens per step   " + "  ".join(f"{label:>24}" for label in labels.values())]
    for kind in next(iter(results.values())):
        cells = [f"{kinds[kind].tokens_per_step:24.3f}" for kinds in results.values()]
        lines.append(f"{kind:<18}" + "  ".join(cells))
    for name, kinds in results.items():
        lines += ["", f"accepted drafts by position, in %: {labels[name]}"]
        for kind, evaluation in kinds.items():
            rates = " ".join(f"{100 * rate:5.1f}" for rate in evaluation.acceptance)
            lines.append(f"{kind:<18}{rates}")
    return lines


@command
@text_options
@option("--adapter-path", multiple=True, help="Adapter folder or hub id; repeatable.")
@option("--layout", type=click.Choice(LAYOUTS), default="quadratic")
@option("--num-draft-tokens", type=int, help="Draft tokens per step.", show_default="the adapter's")
@option(
    "--draft-vocabulary",
    type=click.IntRange(0),
    help="Frequent tokens that drafts come from; 0 for all tokens.",
    show_default="that of decoding",
)
@option("--batch-size", default=16, help="Number of prompts answered together.")
@AS_JSON
def main(
    *,
    model: str | None,
    adapter_path: Sequence[str],
    layout: str,
    num_draft_tokens: int | None,
    draft_vocabulary: int | None,
    as_json: bool,
    **options: Any,
) -> dict[str, Any]:
    """Compare adapters in tokens per step on greedy answers."""
    from mlx_mtp.loading import load

    results: dict[str, dict[str, Evaluation]] = {}
    texts: list[GreedyText] = []
    start, generation_s = time.perf_counter(), 0.0
    for name in adapter_path or [DEFAULT_ADAPTER]:
        loaded, tokenizer = load(model, adapter_path=None if name == DEFAULT_ADAPTER else name)
        if draft_vocabulary is not None:
            size = draft_vocabulary
            loaded.frequent = frequent_head(loaded, size=size) if size else None
        k = checked_num_masks(loaded, num_draft_tokens)  # before the slow part
        if not texts:
            texts = answer_prompts(loaded, tokenizer, **options)
            generation_s = time.perf_counter() - start
        with counting(f"Evaluating {name}") as progress:
            answers = list(
                count_answers(
                    loaded,
                    [text.sequence for text in texts],
                    max_tokens=options["max_tokens"],
                    num_draft_tokens=k,
                    progress=progress,
                )
            )
        results[name] = {
            kind: summarise(group, num_draft_tokens=k, layout=layout)
            for kind, group in by_kind(texts, answers).items()
        }
    if not as_json:
        print("\n".join(table(results)))
    return {
        "prompts": options["prompts"],
        "num_prompts": len(texts),
        "max_tokens": options["max_tokens"],
        "layout": layout,
        "texts": texts_hash(texts),
        "results": {
            name: {kind: evaluation.to_dict() for kind, evaluation in kinds.items()}
            for name, kinds in results.items()
        },
        "generation_seconds": round(generation_s, 1),
        "seconds": round(time.perf_counter() - start, 1),
    } | machine_info()


if __name__ == "__main__":
    main()
