"""Mistakes to plant in decoding, which verification must find."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_mtp.decoding.accept
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import Wrapper, replace


def accept_first_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a mistake: the first draft always holds."""
    real = mlx_mtp.decoding.accept.accept_greedy

    def broken(logits: mx.array, drafts: mx.array) -> tuple[mx.array, mx.array]:
        tokens, num_accepted = real(logits, drafts)
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
