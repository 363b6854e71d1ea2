"""Mistakes to plant in decoding, which verification must find."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_mtp.decoding.accept
from mlx_mtp.model.attention import inject_attention
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import Wrapper, replace


def accept_first_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a mistake: the first draft always holds."""
    real = mlx_mtp.decoding.accept.accept_greedy

    def broken(logits: mx.array, drafts: mx.array, *tree: Any) -> tuple[mx.array, mx.array]:
        tokens, num_accepted = real(logits, drafts, *tree)
        if drafts.size == 0:
            return tokens, num_accepted
        tokens = mx.concatenate([drafts[:1].astype(tokens.dtype), tokens[1:]])
        return tokens, mx.maximum(num_accepted, 1)

    monkeypatch.setattr("mlx_mtp.decoding.accept.accept_greedy", broken)


class RowDependent(Wrapper):
    """A layer whose output depends on the number of rows, by a factor of ``1 + error``."""

    def __init__(self, wrapped: nn.Module, error: float) -> None:
        super().__init__(wrapped)
        self.error = error

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[B, L, in]`` to ``[B, L, out]``."""
        y = self.wrapped(x)
        return y * (1 + self.error) if x.shape[1] > 1 else y


def plant_row_dependence(model: MTPModel, error: float) -> None:
    """Plant a layer that computes several rows differently from one."""
    path = "model.layers.1.mlp"
    replace(model.base, {path: RowDependent(model.base.model.layers[1].mlp, error)})


def make_row_exact(model: MTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let products and attention compute every row alone, so that rows have the same bits."""
    linear, unembed = nn.Linear.__call__, nn.Embedding.as_linear

    def by_row(function: Any) -> Any:
        def call(self: Any, x: mx.array) -> mx.array:
            if x.ndim == 1:
                return function(self, x)
            rows = [function(self, x[..., i : i + 1, :]) for i in range(x.shape[-2])]
            return mx.concatenate(rows, axis=-2)

        return call

    def attend(queries: Any, keys: Any, values: Any, *, scale: float, mask: Any) -> mx.array:
        num_rows, num_keys = queries.shape[2], keys.shape[2]
        if mask is None or isinstance(mask, str):
            seen = np.tri(num_rows, num_keys, num_keys - num_rows, dtype=bool)
        else:
            seen = np.broadcast_to(np.array(mask).squeeze(), (num_rows, num_keys))
        rows = []
        for i in range(num_rows):
            places = mx.array(np.flatnonzero(seen[i]))
            part = (queries[:, :, i : i + 1], keys[:, :, places], values[:, :, places])
            rows.append(mx.fast.scaled_dot_product_attention(*part, scale=scale))
        return mx.concatenate(rows, axis=2)

    monkeypatch.setattr(nn.Linear, "__call__", by_row(linear))
    monkeypatch.setattr(nn.Embedding, "as_linear", by_row(unembed))
    inject_attention(model.base, attend)
