"""Drafts from independent heads on the final hidden state of the last row.

Head j predicts the token j + 1 positions after the one that the model's own head predicts, so all
drafts of a step come from one state and do not know each other (see ``model.draft_heads``).
"""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.drafting.drafter import Distribution, Drafts
from mlx_mtp.drafting.hidden_rows import HiddenRowsDrafter, relative_cost
from mlx_mtp.drafting.shortlist import draw
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import HEADS


class HeadsDrafter(HiddenRowsDrafter):
    """Proposes one token of each head.

    Args:
        model: a model with ``heads``.
        cache: its caches.
        distribution: turns logits into the probabilities that drafts are drawn from; None drafts
            the most likely tokens.
        max_drafts: maximum drafts of a step, at most as many as there are heads.
    """

    def __init__(
        self,
        model: MTPModel,
        cache: MTPCache,
        distribution: Distribution | None,
        *,
        max_drafts: int | None = None,
    ) -> None:
        assert model.heads is not None
        self._model, self._heads = model, model.heads
        self._distribution = distribution
        count = self._heads.num_draft_tokens
        super().__init__(
            HEADS, cache, self._heads.make_cache, max_drafts=min(max_drafts or count, count),
            first_cost=relative_cost(model, self._heads), next_cost=0.0,
        )  # fmt: skip

    def _read(self, hidden: mx.array, next_ids: mx.array) -> mx.array:
        """Run the heads; their states after the last row, ``[n, 1, D]``."""
        if not self._heads.remembers:
            hidden = hidden[:, -1:]
        return self._heads(hidden, cache=self._rows.cache)[:, -1:]

    def _draft(self, last: mx.array, count: int, *, key: mx.array) -> Drafts:
        return draw(self._model.logits(last[:count])[:, 0], self._distribution, key=key)
