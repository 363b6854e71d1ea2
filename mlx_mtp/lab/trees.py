"""Tokens per step of trees and of the best chain layout: ``python -m mlx_mtp.lab.trees``.

Both are counted on the same greedy answers for each number of rows (``evaluation.tree_steps``).
The best chain layout is that of ``planning.policy`` for the acceptance measured on these answers,
so it is the best in hindsight.  Intervals are over texts (bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_mtp.cli.options import AS_JSON, option
from mlx_mtp.evaluation.acceptance import accepted_counts
from mlx_mtp.evaluation.greedy_texts import texts_hash
from mlx_mtp.evaluation.tree_steps import MaskStates, best_chain_steps, tree_steps
from mlx_mtp.lab.commands import answer_prompts, command, counting, machine_info, text_options
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import GPU_GUESS, LiveCosts

DEFAULT_ROWS = (4, 8, 12, 16, 24, 32)
_DRAWS = 2000  # of the bootstrap


def ratio(steps: np.ndarray, control: np.ndarray) -> tuple[float, float, float]:
    """Tokens per step over those of a control on the same texts, and its 95% interval.

    Args:
        steps: of each text, ``[N]``.
        control: steps of the control, ``[N]``.
    """
    drawn = np.random.default_rng(0).integers(0, len(steps), (_DRAWS, len(steps)))
    ratios = control[drawn].sum(axis=1) / steps[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(control.sum() / steps.sum()), float(low), float(high)


@command
@text_options
@option("--adapter-path", help="Adapter folder or hub id.", show_default="the default one")
@option("--max-rows", multiple=True, type=int, default=DEFAULT_ROWS, help="Rows; repeatable.")
@AS_JSON
def main(
    *,
    model: str | None,
    adapter_path: str | None,
    max_rows: Sequence[int],
    as_json: bool,
    **options: Any,
) -> dict[str, Any]:
    """Count the steps of trees, with and without lookup, and of the best chain layout."""
    from mlx_mtp.loading import load

    loaded, tokenizer = load(model, adapter_path=adapter_path)
    texts = [text for text in answer_prompts(loaded, tokenizer, **options) if len(text.answer) > 2]
    k = loaded.num_draft_tokens
    counts, steps = [], {rows: {"trees": [], "with lookup": []} for rows in max_rows}
    known = {
        (rows, name): Speculation(LiveCosts(GPU_GUESS), Acceptance.unknown(k))
        for rows in max_rows
        for name in steps[rows]
    }
    with counting("Counting steps") as progress:
        for index, text in enumerate(texts):
            progress(index, len(texts))
            ids, first = text.prompt + text.answer, len(text.prompt)
            counts.append(accepted_counts(loaded, ids, range(first - 1, len(ids) - 2)))
            states = MaskStates(loaded, ids, first=first)
            for (rows, name), each in known.items():
                found = tree_steps(states, each, max_rows=rows, lookup=name == "with lookup")
                steps[rows][name].append(found)
    shares = [float((np.concatenate(counts) > j).mean()) for j in range(k)]
    probs = np.array([1.0, *shares])
    tokens = np.array([len(text.answer) for text in texts])
    results: dict[str, Any] = {}
    lines = [
        "| rows | best chain | trees | over the chain | with lookup | over the chain |",
        "|---|---|---|---|---|---|",
    ]
    for rows in max_rows:
        chain = np.array(
            [best_chain_steps(each, probs, max_rows=rows, num_waiting=k) for each in counts]
        )
        cells = [str(rows), f"{tokens.sum() / chain.sum():.3f}"]
        results[str(rows)] = {"chain": float(tokens.sum() / chain.sum())}
        for name, found in steps[rows].items():
            mean, low, high = ratio(np.array(found), chain)
            cells += [f"{tokens.sum() / sum(found):.3f}", f"{mean:.3f} [{low:.3f}, {high:.3f}]"]
            results[str(rows)][name] = {"ratio": mean, "low": low, "high": high}
        lines.append(f"| {' | '.join(cells)} |")
    if not as_json:
        print("\n".join(lines))
    return {
        "num_texts": len(texts), "texts": texts_hash(texts), "results": results,
    } | machine_info()  # fmt: skip


if __name__ == "__main__":
    main()
