"""Token counts and timings in the formats that clients know.

OpenAI's ``usage`` with accepted and rejected prediction tokens, llama.cpp's ``timings`` with
``draft_n`` and ``draft_n_accepted``, and this project's ``mtp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_mtp.apps.engine.batch import Choice


def usage(choices: Sequence[Choice], *, prompts: int = 1) -> dict[str, Any]:
    """Return OpenAI's ``usage``; a prompt with several answers counts once.

    Args:
        choices: the answers, sorted by prompt.
        prompts: number of prompts.
    """
    per_prompt = max(1, len(choices) // prompts)
    prompt = sum(choice.prompt_tokens for choice in choices[::per_prompt])
    cached = sum(choice.cached_tokens for choice in choices[::per_prompt])
    done = _total(choices, "generation_tokens")
    drafted, accepted = _total(choices, "num_draft_tokens"), _total(choices, "num_accepted")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": done,
        "total_tokens": prompt + done,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
            "reasoning_tokens": sum(choice.result.reasoning_tokens for choice in choices),
            "audio_tokens": 0,
        },
    }


def timings(choice: Choice) -> dict[str, Any]:
    """Return llama.cpp's ``timings`` of one answer."""
    stats = choice.result.stats
    prompt, done = stats["prompt_tokens"], stats["generation_tokens"]
    return {
        "cache_n": stats["cached_tokens"],
        "prompt_n": prompt,
        "prompt_ms": _ms(prompt, stats["prompt_tps"]),
        "prompt_per_second": round(stats["prompt_tps"], 3),
        "predicted_n": done,
        "predicted_ms": _ms(done, stats["generation_tps"]),
        "predicted_per_second": round(stats["generation_tps"], 3),
        "draft_n": stats["num_draft_tokens"],
        "draft_n_accepted": stats["num_accepted"],
    }


def mtp_summary(choice: Choice) -> dict[str, Any]:
    """Return step and draft counts of one answer."""
    stats = choice.result.stats
    return {
        "steps": stats["num_steps"],
        "tokens": stats["generation_tokens"],
        "tokens_per_step": round(stats["tokens_per_step"], 3),
        "drafted": stats["num_draft_tokens"],
        "accepted": stats["num_accepted"],
        "drafters": {
            source: {"drafted": drafted, "accepted": accepted}
            for source, (drafted, accepted) in stats["drafters"].items()
        },
    }


def _total(choices: Sequence[Choice], name: str) -> int:
    return sum(choice.result.stats[name] for choice in choices)


def _ms(count: int, tps: float) -> float:
    return round(1e3 * count / tps, 3) if tps > 0 else 0.0
