"""Heads whose drafts are written down beforehand."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.scripted import Script

_LOGIT = 30.0  # of the planted token, over all others


class PlantedHeads(nn.Module):
    """Heads that draft what a script says, by the number of rows in their cache.

    The vocabulary must not be larger than the model is wide, so that there is a state for any
    logits.

    Args:
        model: whose own head turns the states into logits.
        script: (position of the drafted token, which head) to an id.
        count: number of heads.
    """

    remembers = True

    def __init__(self, model: MTPModel, script: Script, count: int) -> None:
        super().__init__()
        self.num_draft_tokens = count
        self._script = script
        table = np.array(model.unembed_rows(mx.arange(model.vocab_size)))  # [V, D]
        self._states = mx.array(_LOGIT * np.linalg.pinv(table).T)  # [V, D]
        logits = model.logits(self._states[None])[0]
        assert mx.argmax(logits, axis=-1).tolist() == list(range(model.vocab_size))

    def make_cache(self) -> MTPCache:
        """Count rows."""
        return MTPCache([LayerCache(KVCache(), scope=StepScope())])

    def __call__(self, hidden: mx.array, *, cache: Any) -> mx.array:
        """States of the planted tokens, ``[n, L, D]``."""
        first, num_rows = cache.layers[0].offset, hidden.shape[1]
        rows = mx.zeros((1, 1, num_rows, 1))
        cache.layers[0].update_and_fetch(rows, rows)
        tokens = [
            [self._script(row + 2 + head, head) for row in range(first, first + num_rows)]
            for head in range(self.num_draft_tokens)
        ]
        return self._states[mx.array(tokens) % len(self._states)]
