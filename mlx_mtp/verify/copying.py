"""Decoding with drafts from a copy of the answer, for models with and without an adapter.

The text is preceded by the prompt and an altered copy of its plain answer, from which every step
looks up its drafts.  Most are accepted and the altered ones are rejected, so that few tokens
exercise steps of several rows and the rewinding of the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.suffix_lookup import SuffixLookup
from mlx_mtp.model.layout import linear_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.lookup import LookupAcceptance
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import LOOKUP, Plan

_ALTERED = 5  # one in so many ids of the copy


class CopyPlanner:
    """Plans steps without masks that verify all looked-up drafts, up to a number of them."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def plan(self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), **_: Any) -> Plan:
        """Plan one step; ``AutoPlanner.plan`` has the arguments."""
        drafts = min(sum(offer.num_drafts for offer in offers), self.num_draft_tokens, room - 1)
        layout = linear_layout(num_pending=num_pending, num_draft_tokens=drafts, num_masks=0)
        return Plan(layout, source=LOOKUP if drafts else "")

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


def decode_copy(
    model: MTPModel,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    num_draft_tokens: int,
    **options: Any,
) -> Iterator[StepResult]:
    """Decode greedily with drafts from an altered copy of the plain answer.

    Args:
        model: the model.
        prompt: ids of the prompt.
        answer: ids of the plain answer.
        num_draft_tokens: maximum number of drafts per step.
        options: the other arguments of ``make_request``, such as ``max_tokens``.

    Yields:
        Each step that emits ids.
    """
    request = make_request(model, prompt, layout="plain", **options)
    copy = [
        (token + 1) % model.vocab_size if index % _ALTERED == _ALTERED - 1 else token
        for index, token in enumerate(answer)
    ]
    request.planner = CopyPlanner(num_draft_tokens)
    text = SuffixLookup([*prompt, *copy, *prompt])
    request.drafters = [LookupDrafter(text, LookupAcceptance())]
    while not request.finished:
        [outcome] = run(model, [request.plan()])
        result = request.commit(outcome)
        if result.tokens:
            yield result
