"""Chains of two drafters: looked-up ids after the drafts that mask tokens made."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_mtp.drafting.drafter import CommittedStep, Drafter, Drafts
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.drafting.suffix_lookup import Match
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import CHAIN


class ChainDrafter(Drafter):
    """Proposes the drafts of mask tokens, then what followed them earlier in the text.

    Args:
        masks: proposes the first drafts, all that wait.
        lookup: proposes those after them.
    """

    source = CHAIN

    def __init__(self, masks: MaskTokenDrafter, lookup: LookupDrafter) -> None:
        self._masks = masks
        self._lookup = lookup
        self._match = Match([], 0)

    def offer(self, room: int) -> Offer:
        """What followed the waiting drafts, on the assumption that they are accepted."""
        waiting = self._masks.waiting
        if not len(waiting):
            return Offer(CHAIN, 0)
        self._match = self._lookup.find_after(waiting.ids())
        count = max(min(len(self._match.tokens), room - len(waiting)), 0)
        if not count:
            return Offer(CHAIN, 0)
        probs = self._lookup.prefix_probs(self._match, count)
        return Offer(CHAIN, count, probs, follows=len(waiting))

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """All waiting drafts, then the first ids after the match."""
        waiting = self._masks.waiting
        found = self._match.tokens[: count - len(waiting)]
        joined = Drafts.joined([waiting, Drafts.certain(mx.array(found, mx.int32))])
        return replace(joined, host_ids=[*waiting.ids(), *found])

    def commit(self, step: CommittedStep) -> None:
        """Nothing: the two drafters take note of each step themselves."""
