"""Mistakes to plant in decoding, which verification must find."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlx_mtp.decoding.accept


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
