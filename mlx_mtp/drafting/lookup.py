"""Drafts by suffix lookup: the ids that followed the last few ids where the text had them before.

Prompt lookup (Saxena 2023; also in transformers and llama.cpp): an answer that repeats its prompt,
as edits and summaries do, continues as the prompt did.  It costs no rows until drafts are verified.

A copy that is edited breaks off at the new words, and mostly resumes shortly after the place where
it broke off.  There a single matching id is enough to resume it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_mtp.drafting.drafter import CommittedStep, Drafter, Drafts
from mlx_mtp.drafting.suffix_lookup import Match, SuffixLookup
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS, LookupAcceptance
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import LOOKUP


def text_of(
    cache: MTPCache,
    ids: Sequence[int],
    *,
    num_prompt: int,
    sources: Sequence[Sequence[int]] = (),
) -> SuffixLookup:
    """The text of an answer, which continues that of the last answer with the same cache.

    Args:
        cache: the caches, which remember the text.
        ids: those in the cache, as far as they are known, and the prompt.  If some are not known,
            the text that the cache remembers has them, unless it was changed without lookup.
        num_prompt: number of ids of the prompt.
        sources: texts apart from these.
    """
    text = cache.drafter_memory.get(LOOKUP)
    if not isinstance(text, SuffixLookup) or text.sources != sources:
        text = SuffixLookup(ids, sources=sources)
    elif len(ids) - num_prompt < cache.offset <= len(text):
        text.truncate(cache.offset)
        text.extend(ids[-num_prompt:])
    else:
        text.replace(ids)
    cache.drafter_memory[LOOKUP] = text
    return text


class LookupDrafter(Drafter):
    """Proposes what followed the text's last ids before.

    Args:
        text: the text so far, to which the emitted ids are added.
        acceptance: acceptance of looked-up ids in general, which keeps learning.

    Attributes:
        match: the proposal.
    """

    source = LOOKUP

    def __init__(self, text: SuffixLookup, acceptance: LookupAcceptance) -> None:
        self._text = text
        self._acceptance = acceptance.in_text()
        self.match = self._text.find(MAX_LOOKUP_TOKENS)

    def find_after(self, ids: Sequence[int]) -> Match:
        """What would be proposed if these ids followed the text."""
        return self._text.find_after(ids, MAX_LOOKUP_TOKENS)

    def prefix_probs(self, match: Match, count: int) -> np.ndarray:
        """Probability that at least j ids of a match are accepted, ``[count + 1]``."""
        return self._acceptance.prefix_probs(match.length, count)

    def offer(self, room: int) -> Offer:
        """The ids after the match."""
        count = min(len(self.match.tokens), room)
        if not count:
            return Offer(LOOKUP, 0)
        return Offer(LOOKUP, count, self.prefix_probs(self.match, count))

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """The first ids after the match."""
        tokens = self.match.tokens[:count]
        return replace(Drafts.certain(mx.array(tokens, mx.int32)), host_ids=tokens)

    def commit(self, step: CommittedStep) -> None:
        """Judge the match by the emitted ids, add them to the text and look up what may follow."""
        if not step.tokens:
            return
        num_judged = min(len(step.tokens), len(self.match.tokens))
        self._acceptance.observe(self.match.length, num_judged, self.match.num_right(step.tokens))
        self._text.extend(step.tokens)
        self.match = self._text.find(MAX_LOOKUP_TOKENS)
