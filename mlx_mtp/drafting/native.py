"""Drafts from the MTP modules that a checkpoint was trained with (DeepSeek-V3, section 2.2).

The first module reads each row's final hidden state and the embedding of the id that follows, and
its output predicts the id after that.  The next one reads its output and the id after that, and so
on; after the last one the first continues from its output and its draft.
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

    def _read(self, hidden: mx.array, next_ids: mx.array) -> list[mx.array]:
        """Read rows; the states ``[1, 1, D]`` of each module's last one."""
        last = self._rows.last or ()
        return self._module.read(hidden, next_ids, cache=self._rows.cache, last=last)

    def _draft(self, last: list[mx.array], count: int, *, key: mx.array) -> Drafts:
        """Chain drafts; module i makes draft i, and the first follows the last.

        Module i is i rows behind, so with the drafts before it first catches up with the text.
        """
        drafts: list[Drafts] = []
        states = last[0]
        for index, step_key in enumerate(mx.random.split(key, count)):
            if drafts:
                if index >= self._module.num_modules:
                    states = states[:, -1:]
                elif 1 < index <= len(last):
                    states = mx.concatenate([last[index - 1], states], axis=1)
                ids = mx.concatenate([each.tokens for each in drafts])[None]
                ids = ids[:, -states.shape[1] :]
                states = self._module(states, ids, cache=self._rows.cache, index=index)
            logits = self._module.logits(states[:, -1:], index)[0]
            drafts.append(draw(logits, self._distribution, key=step_key))
        return Drafts.joined(drafts)
