"""Convert an adapter checkpoint into an adapter folder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as lm_utils

from mlx_mtp.config import CONFIG_FILE, WEIGHTS_FILE, MTPConfig
from mlx_mtp.converters import adapters
from mlx_mtp.default_model import DEFAULT_MODEL_NAME, default_model_path
from mlx_mtp.folders import new_folder
from mlx_mtp.loading import read_tensors, resolve
from mlx_mtp.lora import linear_dims
from mlx_mtp.model import MTPModel, fingerprint

PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_SAMPLER_FILE = "sampler_model.safetensors"
CARD_FILE = "README.md"


def convert_adapter(
    checkpoint: Path,
    output: Path,
    *,
    base_model: Path | str | None = None,
    licence: str | None = None,
    force: bool = False,
) -> MTPConfig:
    """Convert a checkpoint in the layout of PEFT pull request 3541 into an adapter folder.

    Args:
        checkpoint: folder with ``adapter_config.json``, ``adapter_model.safetensors`` and, if the
            adapter has a sampler, ``sampler_model.safetensors``.
        output: the new folder: ``adapter_config.json``, ``adapters.safetensors``, a model card.
        base_model: folder or hub id of the mlx-lm model that the adapter is for.  None takes the
            one that the checkpoint names; for the default model that is the embedded copy.
        licence: licence of the adapter as the hub writes it, for the model card.
        force: replace ``output`` if it is an adapter folder or empty.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: the checkpoint cannot be converted or does not fit the base model, or the
            output exists or cannot be written.  The message names the file or tensor.
    """
    _check_output(output, force=force)
    settings, tensors = _read_checkpoint(checkpoint)
    name, folder = _find_base(base_model, named=settings.base_model, checkpoint=checkpoint)
    model = _load_base(folder, name=name)
    try:
        _check_fit(tensors, model)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    config = _describe(settings, tensors, model)
    write_adapter(output, config, tensors, card=model_card(config, licence=licence), force=force)
    return config


def write_adapter(
    output: Path, config: MTPConfig, tensors: Mapping[str, mx.array], *, card: str, force: bool
) -> None:
    """Write an adapter folder beside ``output`` and rename it into place.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        with new_folder(output, replace=force) as draft:
            mx.save_safetensors(str(draft / WEIGHTS_FILE), dict(tensors), {"format": "mlx"})
            text = json.dumps(config.to_dict(), indent=2) + "\n"
            (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
            (draft / CARD_FILE).write_text(card, encoding="utf-8")
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as RuntimeError
        raise ValueError(f"cannot write {output}: {error}") from None


def model_card(config: MTPConfig, *, licence: str | None) -> str:
    """Return the adapter's model card, front matter first."""
    front = {
        "library_name": "mlx",
        "base_model": config.base_model,
        "base_model_relation": "adapter",
        "license": licence,
        "pipeline_tag": "text-generation",
        "tags": "[mlx, mlx-mtp, multi-token-prediction, speculative-decoding, lora]",
    }
    lines = [f"{key}: {value}" for key, value in front.items() if value is not None]
    sampler = "a sampler head" if config.sampler else "no sampler head"
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# Multi-token prediction for {config.base_model}",
            "",
            f"An mlx-mtp adapter: {config.num_draft_tokens} mask tokens, gated LoRA of rank "
            f"{config.rank} on {', '.join(config.target_modules)}, and {sampler}. The base model "
            "drafts several tokens a step with it and checks them itself, so the output stays "
            "the base model's own.",
            "",
            "```",
            f"mlx-mtp generate --model {config.base_model} --adapter-path FOLDER --prompt TEXT",
            "```",
            "",
            "It acts on mask rows only and cannot be fused; mlx-lm alone does not load it.",
            "",
        ]
    )


def _check_output(output: Path, *, force: bool) -> None:
    """Refuse to overwrite, and even with ``force`` replace nothing but an adapter folder."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise ValueError(f"{output} already exists")
    replaceable = output.is_dir() and not output.is_symlink()
    if not replaceable or (any(output.iterdir()) and not (output / CONFIG_FILE).is_file()):
        raise ValueError(f"{output} exists and is not an adapter folder")


def _read_checkpoint(
    checkpoint: Path,
) -> tuple[adapters.PeftSettings, dict[str, mx.array]]:
    """Read a checkpoint's settings and its tensors under our names."""
    path = checkpoint / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} is not an adapter checkpoint: no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    tensors = read_tensors(checkpoint / PEFT_WEIGHTS_FILE)
    if (checkpoint / PEFT_SAMPLER_FILE).is_file():
        tensors |= read_tensors(checkpoint / PEFT_SAMPLER_FILE)
    try:
        settings = adapters.read_peft_settings(values)
        return settings, _finite(adapters.convert_peft(tensors, settings=settings))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None


def _finite(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    for name, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise ValueError(f"{name} must be floating point, it is {tensor.dtype}")
        if not mx.isfinite(tensor).all().item():
            raise ValueError(f"{name} holds NaN or infinite values")
    return tensors


def _find_base(
    base_model: Path | str | None, *, named: str | None, checkpoint: Path
) -> tuple[str, Path]:
    """Return the base model's name and folder."""
    if base_model is None and named is None:
        raise ValueError(f"{checkpoint} does not name its base model; give it")
    if base_model is None and named == DEFAULT_MODEL_NAME:
        return DEFAULT_MODEL_NAME, default_model_path()
    chosen = str(base_model or named)
    return named or chosen, resolve(chosen, kind="base model")


def _load_base(folder: Path, *, name: str) -> MTPModel:
    """Load the base model lazily: only its norms and shapes are needed."""
    try:
        base, _ = lm_utils.load_model(folder, lazy=True)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load the base model in {folder}: {error}") from None
    return MTPModel(base, name=name)


def _describe(
    settings: adapters.PeftSettings, tensors: Mapping[str, mx.array], model: MTPModel
) -> MTPConfig:
    return MTPConfig(
        num_draft_tokens=len(settings.mask_rows),
        rank=settings.rank,
        scale=settings.scale,
        target_modules=adapters.target_modules(tensors),
        sampler="mlp" if adapters.has_sampler(tensors) else None,
        base_model=model.name,
        base_model_type=model.base.model_type,
        base_hidden_size=model.hidden_size,
        base_num_layers=len(model.base.layers),
        base_vocab_size=model.vocab_size,
        base_fingerprint=fingerprint(model.base),
    )


def _check_fit(tensors: Mapping[str, mx.array], model: MTPModel) -> None:
    """Check every tensor's shape against the base model."""
    modules = dict(model.base.named_modules())
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf in ("lora_a", "lora_b"):
            layer = modules.get(path)
            if not isinstance(layer, nn.Linear | nn.QuantizedLinear):
                raise ValueError(f"{path} is no linear layer of {model.name}")
            axis = 0 if leaf == "lora_a" else 1
            found, wanted = tensor.shape[axis], linear_dims(layer)[axis]
        else:
            # [k, D], [D, 2D], [D, D] or [D]: the last axis tells.
            width = model.hidden_size
            found = tensor.shape[-1]
            wanted = 2 * width if key == "sampler_head.linear_1.weight" else width
        if found != wanted:
            raise ValueError(f"{key} is {found} wide, but {model.name} needs {wanted}")
