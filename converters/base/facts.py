"""The base model of an adapter: resolved, loaded lazily, described as ``BaseFacts``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.converters.layouts import BaseFacts
from mlx_mtp.converters.layouts.tables import named_masks
from mlx_mtp.loading import resolve
from mlx_mtp.model.base import open_base
from mlx_mtp.model.lora import linear_dims
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.cards import is_hub_id
from mlx_mtp.storage.default_model import DEFAULT_MODEL_NAME, default_model_path
from mlx_mtp.text.detokenizer import load_tokenizer

DEFAULT_NORM_EPS = 1e-6


def find_base(base_model: str | None, *, named: str | None, checkpoint: Path) -> tuple[str, Path]:
    """Find the mlx-lm model that an adapter is for.

    Args:
        base_model: folder or hub id that the user specified.
        named: base model that the checkpoint names.
        checkpoint: for the message.

    Returns:
        The base model's name and its folder; the embedded copy for the default model.

    Raises:
        ValueError: there is neither, or the model does not exist.
    """
    if base_model is None and named is None:
        raise ValueError(f"{checkpoint} does not name its base model: specify it with --base-model")
    if base_model is None and named == DEFAULT_MODEL_NAME:
        return DEFAULT_MODEL_NAME, default_model_path()
    chosen = base_model or named
    assert chosen is not None
    return base_name(chosen, named=named), resolve(chosen, kind="base model")


def base_name(path_or_hf_repo: str, *, named: str | None = None) -> str:
    """Return the name of a base model for configurations and cards: a hub id or a folder's name.

    For a folder, this is the name in the checkpoint, ``named``, unless that is a path: paths of
    private disks are not published.
    """
    path = Path(path_or_hf_repo).expanduser()
    if not path.exists():
        return path_or_hf_repo
    is_name = named is not None and (is_hub_id(named) or re.fullmatch(r"[\w.-]+", named))
    return named if named is not None and is_name else path.resolve().name


def load_base(folder: Path, *, name: str) -> MTPModel:
    """Load a base model lazily: only norms, some rows and shapes are read.

    Raises:
        ValueError: it cannot be loaded, or mask tokens cannot be added to it.
    """
    return MTPModel(open_base_lazily(folder)[0], name=name)


def open_base_lazily(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Build the mlx-lm model of a folder, whose weights are read when they are first used.

    Returns:
        The model and its configuration.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return open_base(folder)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load the base model in {folder}: {error}") from None


def read_facts(model: MTPModel, folder: Path, config: Mapping[str, Any]) -> BaseFacts:
    """Describe the base model to a layout.

    Args:
        model: the model.
        folder: folder with its tokenizer.
        config: its ``config.json``.
    """
    linears = {
        path: linear_dims(module)
        for path, module in model.base.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }

    def embed(ids: Sequence[int]) -> mx.array:
        return model.embed(mx.array(list(ids)))

    def unembed(ids: Sequence[int]) -> mx.array:
        return model.unembed_rows(mx.array(list(ids)))

    return BaseFacts(
        name=model.name,
        model_type=model.base.model_type,
        hidden_size=model.hidden_size,
        num_layers=len(model.base.layers),
        vocab_size=model.vocab_size,
        norm_eps=float(getattr(model.base.args, "rms_norm_eps", DEFAULT_NORM_EPS)),
        **tokenizer_facts(folder) | diffusion_facts(config),
        linears=linears,
        embed=embed,
        unembed=unembed if model.parts.head is not None else None,
        per_layer_size=model.per_layer_size,
        quantised=any(
            isinstance(module, nn.QuantizedEmbedding | nn.QuantizedLinear)
            for module in model.base.modules()
        ),
    )


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Return what ``BaseFacts`` has about a model's tokenizer."""
    try:
        tokenizer: Any = load_tokenizer(folder)._tokenizer
    except Exception:  # transformers raises many types for a folder without a tokenizer
        return {"num_tokens": None}
    vocabulary = tokenizer.get_vocab()
    return {
        "num_tokens": len(tokenizer),
        "mask_token": vocabulary.get("<mask>"),
        "named_masks": named_masks(vocabulary),
        "noise_end": vocabulary.get("<|MASK|>", tokenizer.mask_token_id),
    }


def diffusion_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``BaseFacts`` has of the settings of a diffusion model in ``config.json``."""
    keys = {"noise_end": "mask_token_id", "block_size": "block_size"}
    return {name: config[key] for name, key in keys.items() if type(config.get(key)) is int}
