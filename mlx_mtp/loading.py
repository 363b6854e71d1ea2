"""Load models and adapters from a folder or the Hugging Face Hub, or the embedded default model.

On a CPU device the weights become float32 (``backends/cpu/float32.py``).  A model folder may have
its adapter in ``adapter/``; such a bundle needs no ``adapter_path``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm import utils as lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.backends.cpu.blas import BLAS, SWITCH
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
from mlx_mtp.terminal import Status, first_line, show

HUB_FILES = (
    "*.json", "*.safetensors", "*.txt", "*.jsonl", "*.jinja", "tokenizer.model", "*.py"
)  # fmt: skip
_BROKEN = (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError)


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
        path_or_hf_repo: folder or hub id; None selects the embedded default model.
        adapter_path: adapter folder or hub id; None selects the shipped adapter for the default
            model, and for others the one in the model's own folder, if there is one.
        tokenizer_config: options for the tokenizer.
        trust_remote_code: allow the tokenizer to run code from its folder.
        mtp: False loads the model without an adapter.
        kernels: False keeps the model's own layers, which training needs.
        progress: called with a line of text before work that takes a while.

    Raises:
        ValueError: a file is missing or broken, or the adapter does not fit; one line.
    """
    folder, adapter = locate(path_or_hf_repo, adapter_path if mtp else None, progress=progress)
    name = DEFAULT_MODEL_NAME if path_or_hf_repo is None else path_or_hf_repo
    base, config = _open_base(folder, trust_remote_code)
    with ThreadPoolExecutor(1) as pool:  # MLX converts weights while Python loads the tokenizer
        pending = pool.submit(_load_tokenizer, folder, config, tokenizer_config, trust_remote_code)
        _read_weights(base, folder)
        tokenizer = pending.result()
    if adapter is None or not mtp:
        model = MTPModel(base, name=name)
    else:
        model = _with_adapter(base, name, adapter, shown=adapter_path or str(adapter))
    if kernels:
        set_up_kernels(model.base, report=progress or (lambda line: None))
    return model, tokenizer


def load_with_status(
    path_or_hf_repo: str | None = None, *, extra_eos_token: Sequence[str] = (), **options: Any
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load a model as ``load`` does; show a status line and hints on stderr.

    Args:
        path_or_hf_repo: folder or hub id; None is the embedded default model.
        extra_eos_token: more tokens that end an answer, by text or id.
        options: more arguments of ``load``.

    Raises:
        ValueError: the model or adapter cannot be used, or an end token does not exist.
    """
    with Status("Loading the model ...") as status:
        model, tokenizer = load(path_or_hf_repo, progress=status.update, **options)
    for token in extra_eos_token:
        known = tokenizer.get_vocab().values() if token.isdecimal() else tokenizer.get_vocab()
        if (int(token) if token.isdecimal() else token) not in known:
            raise ValueError(f"--extra-eos-token {token}: the tokenizer has no such token")
        tokenizer.add_eos_token(token)
    if options.get("mtp", True) and model.config is None:
        line = f"{model.name} has no MTP adapter: it generates one token per step"
        show(line, file=sys.stderr)
    on_cpu = mx.default_device() == mx.Device(mx.DeviceType.cpu)
    if BLAS == "reference" and SWITCH not in os.environ and on_cpu and sys.stderr.isatty():
        print("hint: install OpenBLAS (libopenblas0-pthread) for speed", file=sys.stderr)
    return model, tokenizer


def locate(
    path_or_hf_repo: str | None, adapter_path: str | None, *, progress: Any = None
) -> tuple[Path, Path | None]:
    """Find the folders of a model and of its adapter, as ``load`` takes them.

    Returns:
        The model's folder and the adapter's, None if there is no adapter.

    Raises:
        ValueError: one of them does not exist.
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
        kind: ``model`` or ``adapter``, for messages.
        patterns: returns the files to download; by default those of models and adapters.

    Raises:
        ValueError: neither exists.
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
        names = list(patterns() if patterns else HUB_FILES)
        return Path(snapshot_download(path_or_hf_repo, allow_patterns=names))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot find {kind} {path_or_hf_repo} locally or on the Hugging Face Hub: "
            f"{first_line(error)}"
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
            raise ValueError(f"{path}: {name} has NaN or infinite values")
    return config, weights


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is missing or not a valid safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    tensors = read_safetensors(path)
    try:
        mx.eval(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
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


def _open_base(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Build the mlx-lm model of a folder, its weights not read yet, and return its config."""
    if not (folder / "config.json").is_file():
        hint = ": it is an adapter" if (folder / CONFIG_FILE).is_file() else ""
        raise ValueError(f"{folder} is not a model folder{hint} (it has no config.json)")
    try:
        for file in sorted(folder.glob("model*.safetensors")):  # the files that mlx-lm will load
            check_safetensors(file)
        with without_wildcards(folder) as path:
            return lm_utils.load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json is not JSON: {error}") from None
    except _BROKEN as error:
        raise ValueError(f"cannot load the model in {folder}: {first_line(error)}") from None


def _read_weights(base: nn.Module, folder: Path) -> None:
    """Read the weights of a model; on a CPU device they become float32."""
    try:
        base.eval()
        if mx.default_device().type == mx.cpu:
            to_float32(base)
        mx.eval(base.parameters())
    except _BROKEN as error:
        raise ValueError(f"cannot load the model in {folder}: {first_line(error)}") from None


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
        raise ValueError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from None
