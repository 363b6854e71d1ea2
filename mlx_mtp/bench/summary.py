"""From answers to figures: speeds, speed-ups, acceptance, drift.  Pure functions over data."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mlx_mtp.bench.interval import ratio_interval
from mlx_mtp.bench.runs import Answer

LEAST_FOR_DRIFT = 8  # answers of the base; a quarter of fewer says nothing


def figures(
    answers: Sequence[Answer], modes: Sequence[str], *, weights: dict[str, int], seed: int
) -> list[dict[str, Any]]:
    """What was measured, by context, kind of text and mode.

    Args:
        answers: every prompt that occurs has all its modes.
        modes: their names; the first is the base of the speed-ups.
        weights: bytes that each mode has loaded.
        seed: of the intervals.

    Returns:
        JSON-ready rows; ``kind`` is None for all kinds together.
    """
    contexts = dict.fromkeys(each.context for each in answers)
    kinds = dict.fromkeys(each.kind for each in answers)
    rows = []
    for context in contexts:
        here = [each for each in answers if each.context == context]
        for kind in (None, *kinds):
            cell = [each for each in here if kind in (None, each.kind)]
            base = [each for each in cell if each.mode == modes[0]]
            for mode in modes:
                done = [each for each in cell if each.mode == mode]
                if done:
                    place = {"context": context, "kind": kind, "mode": mode}
                    peak = weights[mode] + max(each.timing.peak_bytes for each in done)
                    speedup = _speedup(done, base, seed=seed) if mode != modes[0] else {}
                    rows.append(place | _cell(done) | speedup | {"peak_memory_bytes": peak})
    return rows


def _cell(done: Sequence[Answer]) -> dict[str, Any]:
    """Figures of one mode over some answers."""
    waits = [each.timing.ttft_s * 1e3 for each in done]
    tokens = sum(len(each.timing.ids) for each in done)
    speeds = [each.tps for each in done if each.tps is not None]
    joules = [each.joules for each in done if each.joules is not None]
    prompt = _rates(done, lambda a: a.prompt_tokens, lambda a: a.timing.ttft_s)
    generation = _rates(done, lambda a: a.timing.timed, lambda a: a.timing.seconds)
    return {
        "prompts": len({each.prompt for each in done}),
        "answers": len(done),
        "prompt_tokens": statistics.median(each.prompt_tokens for each in done),
        "prompt_tps": prompt[0],
        "prompt_tps_sd": prompt[1],
        "tokens": tokens,
        "tps": generation[0],
        "tps_sd": generation[1],
        "median_tps": statistics.median(speeds) if speeds else None,
        "ttft_p50_ms": float(np.percentile(waits, 50)),
        "ttft_p99_ms": float(np.percentile(waits, 99)),
        "tokens_per_step": tokens / sum(each.timing.steps for each in done),
        "repeated": sum(each.repeated for each in done) / tokens,
        **_acceptance(done),
        "joules_per_token": sum(joules) / tokens if len(joules) == len(done) else None,
    }


def _rates(
    done: Sequence[Answer],
    count: Callable[[Answer], float],
    seconds: Callable[[Answer], float],
) -> tuple[float | None, float | None]:
    """Tokens a second over all answers, and its standard deviation from pass to pass."""
    passes: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in done:
        passes[each.repeat][0] += count(each)
        passes[each.repeat][1] += seconds(each)
    rates = [tokens / time for tokens, time in passes.values() if time > 0]
    time = sum(each[1] for each in passes.values())
    rate = sum(each[0] for each in passes.values()) / time if time > 0 else None
    return rate, statistics.stdev(rates) if len(rates) > 1 else None


def _acceptance(done: Sequence[Answer]) -> dict[str, Any]:
    """Drafts by position: how often verified, and how often it and all before it held."""
    size = max(len(each.timing.verified) for each in done)
    verified, held = np.zeros(size, int), np.zeros(size, int)
    lookup = np.zeros(2, int)
    for each in done:
        verified[: len(each.timing.verified)] += np.array(each.timing.verified, int)
        held[: len(each.timing.held)] += np.array(each.timing.held, int)
        lookup += np.array(each.timing.lookup)
    return {
        "verified": verified.tolist(),
        "held": held.tolist(),
        "lookup_verified": int(lookup[0]),
        "lookup_held": int(lookup[1]),
    }


def _speedup(done: Sequence[Answer], base: Sequence[Answer], *, seed: int) -> dict[str, Any]:
    """Ratio of tokens a second to the base, with its interval and the median over pairs."""
    ours, theirs = _by_prompt(done), _by_prompt(base)
    mode = np.array([ours[prompt] for prompt in theirs])
    plain = np.array([theirs[prompt] for prompt in theirs])
    (tokens, seconds), (base_tokens, base_seconds) = mode.sum(0), plain.sum(0)
    if min(tokens, seconds, base_tokens, base_seconds) <= 0:
        return {"speedup": None, "speedup_low": None, "speedup_high": None, "median_speedup": None}
    low, high = ratio_interval(mode, plain, seed=seed) or (None, None)
    return {
        "speedup": float((tokens / seconds) / (base_tokens / base_seconds)),
        "speedup_low": low,
        "speedup_high": high,
        "median_speedup": _median_of_pairs(done, base),
    }


def _by_prompt(done: Iterable[Answer]) -> dict[str, list[float]]:
    """Timed tokens and seconds of each prompt, all repeats together."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in done:
        sums[each.prompt][0] += each.timing.timed
        sums[each.prompt][1] += each.timing.seconds
    return sums


def _median_of_pairs(done: Sequence[Answer], base: Sequence[Answer]) -> float | None:
    speeds = {(each.prompt, each.repeat): each.tps for each in base}
    ratios = [
        each.tps / other
        for each in done
        if each.tps and (other := speeds[(each.prompt, each.repeat)])
    ]
    return statistics.median(ratios) if ratios else None


def layouts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Steps by mode, context and layout, answers' first steps left out.

    Returns:
        Rows with the drafts, the masks, the number of such steps and their mean milliseconds,
        emission included.
    """
    sums: dict[tuple[str, int, int, int], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in answers:
        for (drafts, masks), (count, seconds) in each.timing.layouts.items():
            entry = sums[(each.mode, each.context, drafts, masks)]
            entry[0] += count
            entry[1] += seconds
    return [
        {"mode": mode, "context": context, "drafts": drafts, "masks": masks}
        | {"steps": int(count), "ms": 1e3 * seconds / count}
        for (mode, context, drafts, masks), (count, seconds) in sorted(sums.items())
    ]


def outputs(answers: Sequence[Answer], ours: Sequence[str]) -> dict[str, Any]:
    """Whether the modes wrote the same.

    Args:
        answers: all of them.
        ours: names of the modes whose ids must be equal; the first is what others are held against.

    Returns:
        ``reference``: that mode, None if there is none of ours; ``compared`` and ``different``:
        answers of our other modes; ``where``: some of the different ones; ``others``: the same
        counts for the modes that are not ours, where a difference is no error.
    """
    result: dict[str, Any] = {"reference": ours[0] if ours else None}
    result |= {"compared": 0, "different": 0, "where": [], "others": {}}
    wanted = {_place(each): each.timing.ids for each in answers if each.mode in ours[:1]}
    for each in answers:
        if not wanted or each.mode == ours[0]:
            continue
        differs = each.timing.ids != wanted[_place(each)]
        if each.mode in ours:
            result["compared"] += 1
            result["different"] += differs
            if differs and len(result["where"]) < 10:
                result["where"].append(f"{each.prompt} ({each.mode})")
        else:
            counts = result["others"].setdefault(each.mode, {"compared": 0, "different": 0})
            counts["compared"] += 1
            counts["different"] += differs
    return result


def _place(answer: Answer) -> tuple[str, int, int]:
    return answer.prompt, answer.context, answer.repeat


def drift(answers: Sequence[Answer], base: str) -> float | None:
    """Speed of the base in the last quarter of the run over that in the first.

    Each answer's tokens a second are taken against the mean of its prompt (with one pass: of its
    context), so that it does not matter which prompts fell into which quarter.  None with fewer
    than ``LEAST_FOR_DRIFT`` answers.
    """
    done = [(each, each.tps) for each in answers if each.mode == base and each.tps]
    if len(done) < LEAST_FOR_DRIFT:
        return None
    again = len({each.repeat for each, _ in done}) > 1

    def group(each: Answer) -> tuple[int, str]:
        return each.context, each.prompt if again else ""

    speeds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for each, tps in done:
        speeds[group(each)].append(tps)
    relative = [tps / statistics.mean(speeds[group(each)]) for each, tps in done]
    quarter = len(relative) // 4
    return statistics.mean(relative[-quarter:]) / statistics.mean(relative[:quarter])


def shares(row: dict[str, Any]) -> list[float]:
    """Share of drafts that held, with all before them, by position; from a row of ``figures``."""
    pairs = zip(row["held"], row["verified"], strict=True)
    return [held / verified for held, verified in pairs if verified]


def finite(values: Any) -> Any:
    """The same data with six significant digits, and None for what is no number."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.6g}") if math.isfinite(values) else None
    return values
