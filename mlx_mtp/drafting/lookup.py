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

from mlx_mtp.drafting.drafter import Drafter, Drafts
from mlx_mtp.drafting.suffix_lookup import Match, SuffixLookup
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS
from mlx_mtp.planning.plan import LOOKUP


class LookupDrafter(Drafter):
    """Proposes what followed the text's last ids before.

    Args:
        ids: the text; None proposes nothing.

    Attributes:
        match: the proposal.
    """

    source = LOOKUP

    def __init__(
        self, ids: Sequence[int] | None, *, sources: Sequence[Sequence[int]] = ()
    ) -> None:
        self._text = None if ids is None else SuffixLookup(ids, sources=sources)
        self.match = Match([], 0) if self._text is None else self._text.find(MAX_LOOKUP_TOKENS)

    @property
    def num_drafts(self) -> int:
        return len(self.match.tokens)

    def first(self, count: int) -> Drafts:
        """The first ids after the match."""
        tokens = self.match.tokens[:count]
        return replace(Drafts.certain(mx.array(tokens, mx.int32)), host_ids=tokens)

    def commit(self, layout: StepLayout, tokens: Sequence[int], drafts: Drafts) -> None:
        """Add the emitted ids to the text and look up what may follow."""
        if self._text is not None:
            self._text.extend(tokens)
            self.match = self._text.find(MAX_LOOKUP_TOKENS)
