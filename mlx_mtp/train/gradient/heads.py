"""The heads that are trained: new, or continued from existing ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_mtp.model.config import LAYER, MLP, HeadsConfig
from mlx_mtp.model.draft_heads import layer_sizes, new_weights
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from mlx_mtp.train.settings import TrainSettings

Weights = dict[str, mx.array]


def fresh_heads(model: MTPModel, settings: TrainSettings) -> tuple[HeadsConfig, Weights]:
    """Make heads whose drafts are all the model's own next token."""
    sizes: dict[str, Any] = layer_sizes(model.hidden_size) if settings.head == LAYER else {}
    config = HeadsConfig(
        num_draft_tokens=settings.num_draft_tokens,
        head=settings.head,
        base_model=model.name,
        base_model_type=model.base.model_type,
        base_hidden_size=model.hidden_size,
        base_num_layers=len(model.base.layers),
        base_vocab_size=model.vocab_size,
        base_fingerprint=fingerprint(model.base),
        **sizes,
    )
    return config, new_weights(config, key=mx.random.key(settings.seed))


def continued_heads(
    config: HeadsConfig, weights: Mapping[str, mx.array], settings: TrainSettings
) -> tuple[HeadsConfig, Weights]:
    """Take as many heads as the settings name; additional ones begin as the last one."""
    count = settings.num_draft_tokens
    sources = [min(index, config.num_draft_tokens - 1) for index in range(count)]
    if config.head == MLP:
        taken = {name: value[mx.array(sources)] for name, value in weights.items()}
    else:
        taken = {
            f"layers.{index}.{name.removeprefix(prefix)}": value
            for index, prefix in enumerate(f"layers.{source}." for source in sources)
            for name, value in weights.items()
            if name.startswith(prefix)
        }
    return dataclasses.replace(config, num_draft_tokens=count, acceptance=()), taken
