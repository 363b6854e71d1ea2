"""Drafts from the MTP modules that a checkpoint was trained with (DeepSeek-V3, section 2.2).

The module reads each row's final hidden state and the embedding of the id that follows, and its
output predicts the id after that.  For further drafts it reads its own output and its own draft.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.drafting.drafter import Distribution, Drafts
from mlx_mtp.drafting.hidden_rows import HiddenRowsDrafter, relative_cost
from mlx_mtp.drafting.shortlist import draw
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import NATIVE

MAX_DRAFTS = 8


class NativeDrafter(HiddenRowsDrafter):
    """Proposes what the model's own MTP modules predict.

    Args:
        model: a model with ``native`` modules.
        cache: its caches.
        distribution: turns logits into the probabilities that drafts are drawn from; None drafts
            the most likely tokens.
        max_drafts: maximum drafts of a step.
    """

    def __init__(
        self,
        model: MTPModel,
        cache: MTPCache,
        distribution: Distribution | None,
        *,
        max_drafts: int | None = None,
    ) -> None:
        assert model.native is not None
        self._module = model.native
        self._distribution = distribution
        cost = relative_cost(model, self._module)
        super().__init__(
            NATIVE, cache, self._module.make_cache,
            max_drafts=max_drafts or MAX_DRAFTS, first_cost=cost, next_cost=cost,
        )  # fmt: skip

    def _read(self, hidden: mx.array, next_ids: mx.array) -> mx.array:
        """Read rows by the first module; ``[1, 1, D]`` of the last one."""
        return self._module(hidden, next_ids, cache=self._rows.cache)[:, -1:]

    def _draft(self, last: mx.array, count: int, *, key: mx.array) -> Drafts:
        """Chain drafts; module i makes draft i, and the first follows the last."""
        drafts: list[Drafts] = []
        hidden = last
        for index, step_key in enumerate(mx.random.split(key, count)):
            if drafts:
                token = drafts[-1].tokens[None]
                hidden = self._module(hidden, token, cache=self._rows.cache, index=index)
            logits = self._module.logits(hidden, index)[0]
            drafts.append(draw(logits, self._distribution, key=step_key))
        return Drafts.joined(drafts)
