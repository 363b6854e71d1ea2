"""Load models and adapters: a folder, a hub id, or the embedded default.

On a CPU device weights become float32 (``dense.py``).  A model folder may carry its adapter in
``adapter/``; such a bundle needs no ``adapter_path``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm import utils as lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.backends.cpu.float32 import to_float32
from mlx_mtp.backends.metal.setup import set_up_kernels
from mlx_mtp.model.config import BUNDLED_ADAPTER, CONFIG_FILE, WEIGHTS_FILE, MTPConfig, read_config
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from mlx_mtp.storage.default_model import (
    DEFAULT_MODEL_NAME,
    default_adapter_path,
    default_model_path,
)
from mlx_mtp.storage.folders import without_wildcards
from mlx_mtp.storage.safetensors import check_safetensors, read_safetensors

HUB_FILES = (
    "*.json", "*.safetensors", "*.txt", "*.jsonl", "*.jinja", "tokenizer.model", "*.py"
)  # fmt: skip


def load(
    path_or_hf_repo: str | None = None,
    *,
    adapter_path: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    mtp: bool = True,
    kernels: bool = True,
    progress: Any = None,
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load a model with its tokenizer and adapter.

    Args:
        path_or_hf_repo: folder or hub id; None is the embedded default model.
        adapter_path: adapter folder or hub id; None is the shipped adapter for the default model
            and the one in the model's own folder, if there is one, for others.
        tokenizer_config: options for the tokenizer.
        trust_remote_code: let the tokenizer run code from its folder.
        mtp: False leaves the adapter out.
        kernels: False leaves the model's own layers in place, which training needs.
        progress: called with a line of text before work that takes a while.

    Raises:
        ValueError: something is missing, broken, or does not fit; the message is one line.
    """
    folder, adapter = locate(path_or_hf_repo, adapter_path if mtp else None, progress=progress)
    name = DEFAULT_MODEL_NAME if path_or_hf_repo is None else path_or_hf_repo
    base, config = _load_base(folder, trust_remote_code)
    tokenizer = _load_tokenizer(folder, config, tokenizer_config, trust_remote_code)
    if adapter is None or not mtp:
        model = MTPModel(base, name=name)
    else:
        model = _with_adapter(base, name, adapter, shown=adapter_path or str(adapter))
    if kernels:
        set_up_kernels(model.base, report=progress or (lambda line: None))
    return model, tokenizer


def locate(
    path_or_hf_repo: str | None, adapter_path: str | None, *, progress: Any = None
) -> tuple[Path, Path | None]:
    """Find the folders of a model and of its adapter, as ``load`` takes them.

    Returns:
        The model's folder and the adapter's; None when there is no adapter.

    Raises:
        ValueError: one is not there.
    """
    if path_or_hf_repo is None:
        folder = default_model_path(progress=progress)
    else:
        folder = resolve(path_or_hf_repo, kind="model")
    if adapter_path is not None:
        return folder, resolve(adapter_path, kind="adapter")
    if path_or_hf_repo is None:
        return folder, default_adapter_path()
    bundled = folder / BUNDLED_ADAPTER
    return folder, bundled if (bundled / WEIGHTS_FILE).is_file() else None


def resolve(
    path_or_hf_repo: str, *, kind: str, patterns: Callable[[], Sequence[str]] | None = None
) -> Path:
    """Find a folder, or download a hub repository.

    Args:
        path_or_hf_repo: folder or hub id.
        kind: what it should be, for messages.
        patterns: says which files to download; by default those of models and adapters.

    Raises:
        ValueError: neither is there.
    """
    path = Path(path_or_hf_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{kind} {path_or_hf_repo} is a file, not a folder")
    looks_local = path_or_hf_repo.startswith((".", "/", "~")) or path_or_hf_repo.count("/") != 1
    if looks_local:
        raise ValueError(f"{kind} {path_or_hf_repo} does not exist")
    try:
        wanted = list(patterns() if patterns else HUB_FILES)
        return Path(snapshot_download(path_or_hf_repo, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{kind} {path_or_hf_repo} is neither a folder nor to be had from the hub: {reason}"
        ) from None


def read_adapter(folder: Path) -> tuple[MTPConfig, dict[str, mx.array]]:
    """Read an adapter folder.

    Returns:
        The configuration and the tensors by name: ``mask_embeddings`` ``[k, D]``,
        ``sampler_head.*`` and, for each adapted layer, ``*.lora_a`` ``[in, r]`` and ``*.lora_b``
        ``[r, out]``.

    Raises:
        ValueError: a file is missing or broken, or a tensor is not finite.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    weights = read_tensors(path)
    finite = {name: mx.isfinite(value).all() for name, value in weights.items()}
    mx.eval(finite)
    for name, value in finite.items():
        if not value.item():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
    return config, weights


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is missing or not a sound safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    tensors = read_safetensors(path)
    try:
        mx.eval(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from None
    return tensors


def check_base(base: nn.Module, config: MTPConfig, *, adapter: str, name: str) -> None:
    """Refuse an adapter that was trained for another base model.

    Raises:
        ValueError: the fingerprints differ; the message names both models.
    """
    actual = fingerprint(base)
    if actual != config.base_fingerprint:
        raise ValueError(
            f"adapter {adapter} is for {config.base_model} "
            f"(fingerprint {config.base_fingerprint[:12]}), not for {name} "
            f"(fingerprint {actual[:12]})"
        )


def _load_base(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Load the mlx-lm model of a folder, in float32 on a CPU device."""
    if not (folder / "config.json").is_file():
        hint = ": it is an adapter" if (folder / CONFIG_FILE).is_file() else ""
        raise ValueError(f"{folder} is not a model folder{hint} (it has no config.json)")
    try:
        for file in sorted(folder.glob("model*.safetensors")):  # the files that mlx-lm will load
            check_safetensors(file)
        with without_wildcards(folder) as path:
            base, config = lm_utils.load_model(path, lazy=True, trust_remote_code=trust_remote_code)
        base.eval()
        if mx.default_device().type == mx.cpu:
            to_float32(base)
        mx.eval(base.parameters())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json is not JSON: {error}") from None
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load the model in {folder}: {_first_line(error)}") from None
    return base, config


def _with_adapter(base: nn.Module, name: str, folder: Path, *, shown: str) -> MTPModel:
    """Join a base model and an adapter."""
    config, weights = read_adapter(folder)
    check_base(base, config, adapter=shown, name=name)
    try:
        return MTPModel(base, name=name, config=config, weights=weights)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None


def _load_tokenizer(
    folder: Path, config: dict[str, Any], options: dict[str, Any] | None, trust_remote_code: bool
) -> TokenizerWrapper:
    """Load the tokenizer of a model folder."""
    try:
        return lm_utils.load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code} | (options or {}),
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise ValueError(f"cannot load the tokenizer in {folder}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
