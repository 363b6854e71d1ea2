"""The files of a base model: resolved or downloaded, checked, and arranged for mlx-lm.

mlx-lm loads a folder that contains only links to checked files: safetensors files with valid
headers (PyTorch files are converted first) and small JSON files.  Other files of the original
folder are not visible to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from mlx_mtp.converters.pytorch.checkpoint import torch_to_safetensors
from mlx_mtp.converters.tokenizer.write import SENTENCEPIECE_FILES
from mlx_mtp.loading import resolve
from mlx_mtp.model.aliases import as_known
from mlx_mtp.model.native.stored import EXTRA_FILES
from mlx_mtp.storage.contents import look, model_problem
from mlx_mtp.storage.safetensors import (
    READABLE,
    check_safetensors,
    read_index,
    read_json_object,
    safe_member,
    shown,
)
from mlx_mtp.storage.weights import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    complete,
    safetensors_files,
)
from mlx_mtp.terminal import Status

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TORCH_INDEX = "pytorch_model.bin.index.json"

_SMALL_FILES = (
    *("*.json", "*.txt", "*.jsonl", "*.jinja", "*.tiktoken", "tiktoken.model"),
    *SENTENCEPIECE_FILES,
    *("LICENSE*", "LICENCE*", "NOTICE*", "README.md"),
)
_TORCH = "pytorch_model*.bin"
_NO_MODELS = ("adapter*", "sampler*", "training_args*", "optimizer*", "scheduler*", "rng_*")
_FP8 = {"F8_E4M3", "F8_E5M2", "F8_E8M0"}  # some architectures of mlx-lm unpack them


def resolve_base(hf_path: str, *, trust_remote_code: bool = False) -> Path:
    """Return a model's folder, or download what a conversion needs of a hub repository.

    PyTorch files are downloaded only if there are no safetensors files, Python files only with
    ``trust_remote_code``.  Native modules may be in safetensors files of other names.

    Raises:
        ValueError: there is no such folder or repository.
    """
    small = [*_SMALL_FILES, EXTRA_FILES, *(["*.py"] if trust_remote_code else [])]
    return resolve(hf_path, kind="model", patterns=lambda: [*small, _weights_pattern(hf_path)])


def read_config(source: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Read a model's ``config.json``.

    Raises:
        ValueError: it is missing or broken, or the model or its tokenizer needs custom code and
            ``trust_remote_code`` is false.
    """
    contents = look(source)
    if contents.kind != "model":
        raise ValueError(model_problem(contents))
    config = as_known(read_json_object(source / CONFIG_FILE))
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{source / CONFIG_FILE} has no model_type")
    for name in (CONFIG_FILE, "tokenizer_config.json"):
        values = config
        if name != CONFIG_FILE:
            values = read_json_object(source / name) if (source / name).is_file() else {}
        needs = next((key for key in ("model_file", "auto_map") if values.get(key)), None)
        if needs and not trust_remote_code:
            raise ValueError(
                f"{source / name} has {needs}: the model has custom code, which runs only with "
                "--trust-remote-code"
            )
    return config


def stage(source: Path, config: dict[str, Any], scratch: Path, *, allow_pickle: bool) -> Path:
    """Check a model's files and link them into a new folder in ``scratch``; return that.

    Args:
        source: folder of the model.
        config: its ``config.json``, checked by ``read_config``.
        scratch: folder for the new folder and for safetensors copies of PyTorch files.
        allow_pickle: whether PyTorch files may be read, in a sandbox.

    Raises:
        ValueError: a file is missing, broken, or cannot be read.
    """
    weights = weight_files(source)
    if weights[0].suffix != ".safetensors":
        weights = _from_torch(weights, scratch, allow_pickle=allow_pickle)
    num_tensors = _check_weights(source, weights)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > num_tensors:
        # Building such a model would take too long before another check could fail.
        raise ValueError(
            f"{source / CONFIG_FILE} claims {layers} layers, but there are {num_tensors} tensors"
        )
    folder = scratch / "staged"
    folder.mkdir()
    for number, path in enumerate(weights, 1):
        (folder / f"model-{number:05d}-of-{len(weights):05d}.safetensors").symlink_to(
            path.resolve()
        )
    for path in sorted(set(source.glob(EXTRA_FILES)) - set(weights)):
        check_safetensors(path)
        # mlx-lm must not take it for one of the model's own.
        name = f"mtp-{path.name}" if path.match(SAFETENSORS) else path.name
        (folder / name).symlink_to(path.resolve())
    for name in (CONFIG_FILE, GENERATION_FILE, "hf_quant_config.json", config.get("model_file")):
        if isinstance(name, str) and (source / name).exists():
            if name.endswith(".json"):
                read_json_object(source / name)
            (folder / name).symlink_to(safe_member(source, name).resolve())
    return folder


def weight_files(source: Path, *, dropped: Callable[[str], bool] | None = None) -> list[Path]:
    """Return a model's weights files: safetensors if there are any, otherwise PyTorch files.

    Args:
        source: the model's folder.
        dropped: see ``safetensors_files``.

    Raises:
        ValueError: there are none, an index is broken, or a shard is missing.
    """
    if files := safetensors_files(source, dropped=dropped):
        return files
    if (source / TORCH_INDEX).is_file():
        names = sorted(set(read_index(source / TORCH_INDEX).values()))
        return complete(source, [safe_member(source, name) for name in names])
    if files := sorted(path for path in source.glob(_TORCH) if path.is_file()):
        return complete(source, files)
    others = [
        path
        for path in sorted(source.iterdir())
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth") and path.is_file()
        if not any(fnmatch(path.name, pattern) for pattern in _NO_MODELS)
    ]
    if len(others) == 1:
        return others
    if others:
        names = ", ".join(path.name for path in others[:4])
        raise ValueError(f"{source} has several files that may be the model's: {names}")
    raise ValueError(
        f"{source} has no weights: looked for {SAFETENSORS}, {_TORCH}, "
        "and a single .safetensors, .bin, .pt or .pth file"
    )


def copy_papers(source: Path, output: Path, *, code: bool) -> None:
    """Copy a model's small files: generation settings, chat template, licence, notice."""
    patterns = [GENERATION_FILE, "LICENSE*", "LICENCE*", "NOTICE*"]
    patterns += ["chat_template.jinja", "additional_chat_templates/*.jinja"]
    for pattern in [*patterns, *(["*.py"] if code else [])]:
        for path in source.glob(pattern):
            target = output / path.relative_to(source)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _weights_pattern(repo: str) -> str:
    """Return which weights of a repository to download; without network, the cache decides."""
    try:
        names = HfApi().list_repo_files(repo)
    except HfHubHTTPError:
        raise
    except Exception:  # no network, for which the HTTP library has many types
        folder = Path(snapshot_download(repo, local_files_only=True))
        names = [path.name for path in folder.iterdir()]
    return SAFETENSORS if any(fnmatch(name, SAFETENSORS) for name in names) else _TORCH


def _from_torch(files: Sequence[Path], scratch: Path, *, allow_pickle: bool) -> list[Path]:
    """Convert PyTorch files to safetensors files in ``scratch``, one at a time."""
    converted = []
    for number, path in enumerate(files, 1):
        with Status(f"Reading {path.name} ({number} of {len(files)}) in a sandbox ..."):
            converted.append(torch_to_safetensors(path, scratch, allow_pickle=allow_pickle)[0])
    return converted


def _check_weights(source: Path, files: list[Path]) -> int:
    """Check all headers, also against the index; return the number of tensors."""
    where: dict[str, str] = {}
    for path in files:
        for name, info in check_safetensors(path).items():
            if info.dtype not in READABLE and info.dtype not in _FP8:
                raise ValueError(f"{path}: {name} has type {info.dtype}, which MLX cannot read")
            if name in where:
                raise ValueError(f"{source}: {name} is both in {where[name]} and in {path.name}")
            where[name] = path.name
    listed = source / SAFETENSORS_INDEX
    if files[0].parent == source and listed.is_file() and len(files) > 1:
        for name, file in read_index(listed).items():
            if where.get(name) != file:
                raise ValueError(f"{source / file} has no {shown(name)}, which the index lists")
    return len(where)
