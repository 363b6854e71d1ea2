"""Limits the reasoning of an answer to a number of ids, by forcing the closing mark.

The processor is a function of the ids alone, so speculation stays exact: a draft beyond the budget
is verified by the forced logits and rejected like any other.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_mtp.decoding.sampling import LogitsProcessor
from mlx_mtp.text.reasoning import Reasoning, ReasoningTracker, mark_ids


def budget_processor(tracker: ReasoningTracker, tokenizer: Any, budget: int) -> LogitsProcessor:
    """Return a processor that forces the closing mark when the reasoning has so many ids.

    It must be the last processor, since it leaves only the forced id possible.

    Args:
        tracker: of this answer.
        tokenizer: from ``load``.
        budget: maximum number of ids of reasoning, not counting the marks.
    """
    closing = mark_ids(tokenizer, tracker.reasoning.end)
    begins_inside = tracker.reasoning.phase == "inside"

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        count = tokens.size - tracker.num_prompt
        if count < budget or (begins_inside and count >= budget + len(closing)):
            return logits
        phase, since = tracker.at(tokens)
        index = count - since - budget
        if phase != "inside" or not 0 <= index < len(closing):
            return logits
        forced = mx.full(logits.shape, -mx.inf, logits.dtype)
        forced[..., closing[index]] = 0
        return forced

    return process


def budget_processors(
    tokenizer: Any, reasoning: Reasoning | None, budget: int | None, *, num_prompt: int
) -> list[LogitsProcessor]:
    """Return the processor of a budget, or none where there is no budget or nothing to limit."""
    if budget is None or reasoning is None or reasoning.phase == "after":
        return []
    tracker = ReasoningTracker(tokenizer, reasoning, num_prompt=num_prompt)
    return [budget_processor(tracker, tokenizer, budget)]
