"""From answers to figures: speeds, speed-ups, acceptance, drift.  Pure functions over data."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from mlx_mtp.bench.interval import ratio_interval
from mlx_mtp.bench.runs import Answer
from mlx_mtp.planning.plan import LOOKUP

MIN_FOR_DRIFT = 8  # answers in the baseline mode; a quarter of fewer is too little
_MAX_EXAMPLES = 10  # of answers that differ


def figures(
    answers: Sequence[Answer], modes: Sequence[str], *, weights: dict[str, int], seed: int
) -> list[dict[str, Any]]:
    """Compute the figures by context, kind of text and mode.

    Args:
        answers: every prompt is answered in all modes.
        modes: their names; the first is the baseline of the speed-ups.
        weights: bytes of the weights of each mode.
        seed: random seed of the confidence intervals.

    Returns:
        JSON-ready rows; ``kind`` is None for all kinds together.
    """
    contexts = dict.fromkeys(answer.context for answer in answers)
    kinds = dict.fromkeys(answer.kind for answer in answers)
    rows = []
    for context in contexts:
        for kind in (None, *kinds):
            by_mode: dict[str, list[Answer]] = defaultdict(list)
            for answer in answers:
                if answer.context == context and kind in (None, answer.kind):
                    by_mode[answer.mode].append(answer)
            for mode in modes:
                if done := by_mode[mode]:
                    row = {"context": context, "kind": kind, "mode": mode} | _figures(done)
                    if mode != modes[0]:
                        row |= _speedup(done, by_mode[modes[0]], seed=seed)
                    peak = max(answer.timing.peak_bytes for answer in done)
                    rows.append(row | {"peak_memory_bytes": weights[mode] + peak})
    return rows


def _figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Figures of one mode over some answers."""
    ttft_ms = [answer.timing.ttft_s * 1e3 for answer in answers]
    tokens = sum(len(answer.timing.ids) for answer in answers)
    speeds = [answer.tps for answer in answers if answer.tps is not None]
    joules = [answer.joules for answer in answers if answer.joules is not None]
    prompt = _rates(answers, lambda a: (a.prompt_tokens, a.timing.ttft_s))
    generation = _rates(answers, _generation)
    return {
        "prompts": len({answer.prompt for answer in answers}),
        "answers": len(answers),
        "prompt_tokens": statistics.median(answer.prompt_tokens for answer in answers),
        "prompt_tps": prompt[0],
        "prompt_tps_sd": prompt[1],
        "tokens": tokens,
        "tps": generation[0],
        "tps_sd": generation[1],
        "median_tps": statistics.median(speeds) if speeds else None,
        "ttft_p50_ms": float(np.percentile(ttft_ms, 50)),
        "ttft_p99_ms": float(np.percentile(ttft_ms, 99)),
        "tokens_per_step": tokens / sum(answer.timing.steps for answer in answers),
        "repeated": sum(answer.repeated for answer in answers) / tokens,
        **_acceptance(answers),
        "joules_per_token": sum(joules) / tokens if len(joules) == len(answers) else None,
    }


Measure = Callable[[Answer], tuple[float, float]]  # tokens and seconds of an answer


def _generation(answer: Answer) -> tuple[float, float]:
    return answer.timing.num_timed, answer.timing.seconds


def _sums(
    answers: Sequence[Answer], measure: Measure, key: Callable[[Answer], Hashable]
) -> dict[Any, list[float]]:
    """Tokens and seconds of the answers with the same key, together."""
    sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for answer in answers:
        tokens, seconds = measure(answer)
        sums[key(answer)][0] += tokens
        sums[key(answer)][1] += seconds
    return sums


def _rates(answers: Sequence[Answer], measure: Measure) -> tuple[float | None, float | None]:
    """Tokens per second over all answers, and their standard deviation between passes."""
    passes = _sums(answers, measure, lambda a: a.repeat).values()
    rates = [tokens / seconds for tokens, seconds in passes if seconds > 0]
    tokens, seconds = (sum(column) for column in zip(*passes, strict=True))
    rate = tokens / seconds if seconds > 0 else None
    return rate, statistics.stdev(rates) if len(rates) > 1 else None


def _acceptance(answers: Sequence[Answer]) -> dict[str, Any]:
    """By position and by drafter, how often drafts were verified, and how often accepted.

    By position only those count that were not looked up, and an accepted draft is one that was
    accepted with all drafts before it.
    """
    timings = [answer.timing for answer in answers]
    size = max(len(timing.verified) for timing in timings)
    verified, accepted = np.zeros(size, int), np.zeros(size, int)
    for timing in timings:
        verified[: len(timing.verified)] += np.array(timing.verified, int)
        accepted[: len(timing.accepted)] += np.array(timing.accepted, int)
    drafters: dict[str, dict[str, int]] = {}
    for timing in timings:
        for source, counts in timing.drafters.items():
            total = drafters.setdefault(source, {"verified": 0, "accepted": 0})
            for name, count in zip(total, counts, strict=True):
                total[name] += count
    lookup = drafters.get(LOOKUP, {"verified": 0, "accepted": 0})
    return {
        "verified": verified.tolist(),
        "held": accepted.tolist(),
        "lookup_verified": lookup["verified"],
        "lookup_held": lookup["accepted"],
        "drafters": drafters,
    }


def _speedup(answers: Sequence[Answer], baseline: Sequence[Answer], *, seed: int) -> dict[str, Any]:
    """Speed relative to the baseline, with its interval and the median over pairs of answers."""
    by_prompt, base_by_prompt = (
        _sums(some, _generation, lambda a: a.prompt) for some in (answers, baseline)
    )
    mode = np.array([by_prompt[prompt] for prompt in base_by_prompt])  # [prompts, 2]
    base = np.array(list(base_by_prompt.values()))
    (tokens, seconds), (base_tokens, base_seconds) = mode.sum(0), base.sum(0)
    if min(tokens, seconds, base_tokens, base_seconds) <= 0:
        return {"speedup": None, "speedup_low": None, "speedup_high": None, "median_speedup": None}
    low, high = ratio_interval(mode, base, seed=seed) or (None, None)
    return {
        "speedup": float((tokens / seconds) / (base_tokens / base_seconds)),
        "speedup_low": low,
        "speedup_high": high,
        "median_speedup": _median_of_pairs(answers, baseline),
    }


def _median_of_pairs(answers: Sequence[Answer], baseline: Sequence[Answer]) -> float | None:
    speeds = {(answer.prompt, answer.repeat): answer.tps for answer in baseline}
    ratios = [
        answer.tps / base
        for answer in answers
        if answer.tps and (base := speeds[(answer.prompt, answer.repeat)])
    ]
    return statistics.median(ratios) if ratios else None


def layouts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Count steps by mode, context and layout, without the first steps of answers.

    Returns:
        Rows with the drafts, the masks, the number of such steps and their mean milliseconds,
        including emission.
    """
    sums: dict[tuple[str, int, int, int], list[float]] = defaultdict(lambda: [0, 0.0])
    for answer in answers:
        for (drafts, masks), (count, seconds) in answer.timing.layouts.items():
            entry = sums[(answer.mode, answer.context, drafts, masks)]
            entry[0] += count
            entry[1] += seconds
    return [
        {"mode": mode, "context": context, "drafts": drafts, "masks": masks}
        | {"steps": int(count), "ms": 1e3 * seconds / count}
        for (mode, context, drafts, masks), (count, seconds) in sorted(sums.items())
    ]


def outputs(answers: Sequence[Answer], ours: Sequence[str]) -> dict[str, Any]:
    """Compare the answers of the modes.

    Args:
        answers: all answers.
        ours: names of the modes whose ids must be equal; the first is the reference.

    Returns:
        ``reference``: the reference mode, None without a mode of ours; ``compared`` and
        ``different``: numbers of answers of our other modes; ``where``: some that differ;
        ``others``: the same numbers for the modes of mlx-lm, where a difference is no error.
    """
    result: dict[str, Any] = {"reference": ours[0] if ours else None}
    result |= {"compared": 0, "different": 0, "where": [], "others": {}}
    expected = {_place(answer): answer.timing.ids for answer in answers if answer.mode in ours[:1]}
    for answer in answers:
        if not expected or answer.mode == ours[0]:
            continue
        differs = answer.timing.ids != expected[_place(answer)]
        counts = result
        if answer.mode not in ours:
            counts = result["others"].setdefault(answer.mode, {"compared": 0, "different": 0})
        elif differs and len(result["where"]) < _MAX_EXAMPLES:
            result["where"].append(f"{answer.prompt} ({answer.mode})")
        counts["compared"] += 1
        counts["different"] += differs
    return result


def _place(answer: Answer) -> tuple[str, int, int]:
    return answer.prompt, answer.context, answer.repeat


def drift(answers: Sequence[Answer], baseline: str) -> float | None:
    """Speed of the baseline in the last quarter of the run divided by that in the first.

    The speed of each answer is relative to the mean of its prompt (with one pass: of its context),
    so the order of the prompts has no effect.  None with fewer than ``MIN_FOR_DRIFT`` answers.
    """
    timed = [(answer, answer.tps) for answer in answers if answer.mode == baseline and answer.tps]
    if len(timed) < MIN_FOR_DRIFT:
        return None
    has_repeats = len({answer.repeat for answer, _ in timed}) > 1
    speeds: dict[tuple[int, str], list[float]] = defaultdict(list)
    groups = [(answer.context, answer.prompt if has_repeats else "") for answer, _ in timed]
    for group, (_, tps) in zip(groups, timed, strict=True):
        speeds[group].append(tps)
    means = {group: statistics.mean(values) for group, values in speeds.items()}
    relative = [tps / means[group] for group, (_, tps) in zip(groups, timed, strict=True)]
    quarter = len(relative) // 4
    return statistics.mean(relative[-quarter:]) / statistics.mean(relative[:quarter])


def acceptance_rates(row: dict[str, Any]) -> list[float]:
    """Share of drafts accepted with all drafts before them, by position; from ``figures``."""
    pairs = zip(row["held"], row["verified"], strict=True)
    return [accepted / verified for accepted, verified in pairs if verified]


def finite(values: Any) -> Any:
    """The same data with six significant digits, and None for numbers that are not finite."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.6g}") if math.isfinite(values) else None
    return values
