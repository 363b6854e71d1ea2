"""OpenAI's frequency and presence penalties, over the ids of the answer so far."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from mlx_mtp.decoding.sampling import LogitsProcessor


def answer_penalty(*, num_prompt: int, frequency: float, presence: float) -> LogitsProcessor:
    """Return a processor that lowers the logits of ids that are already in the answer.

    The logit of an id that occurs n times is lowered by ``n * frequency + presence``, as OpenAI
    documents it; the prompt does not count.

    Args:
        num_prompt: number of ids of the prompt, which every context starts with.
        frequency: penalty per occurrence.
        presence: penalty for occurring at all.
    """

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        context: Any = tokens[num_prompt:].tolist()
        if not context:
            return logits
        counts = Counter(context)
        amounts = mx.array([count * frequency + presence for count in counts.values()])
        return logits.at[:, mx.array(list(counts))].subtract(amounts.astype(logits.dtype))

    return process
