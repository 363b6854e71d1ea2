"""OpenAI's frequency and presence penalties, over the ids of the answer so far."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from mlx_mtp.decoding.sampling import LogitsProcessor


def answer_penalty(*, num_prompt: int, frequency: float, presence: float) -> LogitsProcessor:
    """A processor that lowers the logits of ids that the answer holds already.

    An id that occurs n times loses ``n * frequency + presence``, as OpenAI documents it; the prompt
    does not count.

    Args:
        num_prompt: ids of the prompt, which come first in every context.
        frequency: taken off for every time.
        presence: taken off once.
    """

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        context: Any = tokens[num_prompt:].tolist()
        if not context:
            return logits
        counts = Counter(context)
        amounts = mx.array([count * frequency + presence for count in counts.values()])
        return logits.at[:, mx.array(list(counts))].subtract(amounts.astype(logits.dtype))

    return process
