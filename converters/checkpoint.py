"""A checkpoint of another project as plain data: tensors, JSON settings, plain values.

Safetensors files are read after a full check of their header.  PyTorch files are read in a
sandboxed child process, and only if the caller allows it.  Layouts are not known here, and code of
a checkpoint never runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.storage.contents import (
    ADAPTER_CONFIG,
    LATEST_FILE,
    TENSOR_SUFFIXES,
    checkpoint_folder,
    tensor_files,
)
from mlx_mtp.storage.safetensors import (
    read_index,
    read_json,
    read_json_object,
    read_safetensors,
    shown,
)

MAX_FILES = 1000

_KINDS = ", ".join(f"*{suffix}" for suffix in TENSOR_SUFFIXES)
_NAMED_SETTINGS = {ADAPTER_CONFIG, "config.json"}
_NO_SETTINGS = ("tokenizer.json", "vocab.json", "trainer_state.json", LATEST_FILE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The contents of a checkpoint's files.

    Attributes:
        path: the folder or file that was read.
        configs: JSON objects next to the tensors, by file name.
        files: tensors by file name, then by tensor name; read when first used.
        values: plain values in PyTorch files, by dotted name (``config.lora_rank``).
        added_tokens: ids by text of the tokens that were added to the tokenizer next to them.
    """

    path: Path
    files: Mapping[str, Mapping[str, mx.array]]
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, mx.array]:
        """The tensors of all files by name.

        Raises:
            ValueError: two files contain a tensor of one name; the message names all three.
        """
        merged: dict[str, mx.array] = {}
        source: dict[str, str] = {}
        for file, tensors in self.files.items():
            for name, tensor in tensors.items():
                if name in merged:
                    raise ValueError(
                        f"{self.path}: tensor {name} is in both {source[name]} and {file}"
                    )
                merged[name], source[name] = tensor, file
        return merged


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint folder or file.

    ``latest.json`` is followed to the step that it names, and a folder without adapter to its
    ``adapter`` subfolder.  States of training (optimiser, scheduler, random generators) are
    ignored, and so is a PyTorch file whose tensors exist as safetensors too.  With a single file,
    the settings next to it are read.

    Args:
        path: the folder or file.
        allow_pickle: whether PyTorch files may be read, in a sandbox.

    Raises:
        ValueError: a file is missing, broken, refused or needs ``allow_pickle``; one line.
    """
    try:
        if path.is_dir():
            folder = checkpoint_folder(path)
            names = _tensor_files(folder)
            configs = _read_configs(folder, _config_names(folder))
        elif path.suffix in TENSOR_SUFFIXES and path.exists():
            folder, names = path.parent, [path.name]
            beside = (f"{path.stem}.json", "adapter_config.json", "config.json")
            configs = _read_configs(folder, [name for name in beside if (folder / name).is_file()])
        elif path.exists():
            raise ValueError(f"{path} is neither a folder nor a file of tensors ({_KINDS})")
        else:
            raise ValueError(f"{path} does not exist")
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}") from None
    if not names:
        raise ValueError(f"{path} contains no file of tensors ({_KINDS})")
    files, values = _read_files(folder, names, allow_pickle=allow_pickle)
    if path.is_dir():
        _check_indexes(folder, files)
    return Checkpoint(
        path=path, configs=configs, files=files, values=values, added_tokens=_added_tokens(folder)
    )


def _tensor_files(folder: Path) -> list[str]:
    names = tensor_files(folder)
    if len(names) > MAX_FILES:
        raise ValueError(
            f"{folder} contains {len(names)} tensor files, at most {MAX_FILES} are read"
        )
    return names


def _config_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".json" and p.is_file())
    return [n for n in names if n not in _NO_SETTINGS and not n.endswith(".index.json")]


def _read_configs(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Read the JSON objects; a file that contains a list has no settings."""
    values = {name: read_json(folder / name) for name in names}
    for name in _NAMED_SETTINGS & values.keys():
        if (key := _odd_key(values[name])) is not None:
            raise ValueError(f"{folder / name}: {shown(repr(key))} is not a valid setting name")
    return {name: value for name, value in values.items() if isinstance(value, dict)}


def _added_tokens(folder: Path) -> dict[str, int]:
    """Return the added tokens of a tokenizer, from whichever of its files lists them."""

    def read(name: str, key: str | None = None) -> Any:
        try:
            values = read_json_object(folder / name)
        except ValueError:
            return {}
        return values if key is None else values.get(key)

    pairs: list[tuple[Any, Any]] = list(read("added_tokens.json").items())
    decoder, entries = read("tokenizer_config.json", "added_tokens_decoder"), []
    if isinstance(decoder, dict):
        entries += [(token, entry) for token, entry in decoder.items() if token.isdecimal()]
    if isinstance(listed := read("tokenizer.json", "added_tokens"), list):
        entries += [(entry.get("id"), entry) for entry in listed if isinstance(entry, dict)]
    pairs += [(entry.get("content"), id_) for id_, entry in entries if isinstance(entry, dict)]
    return {
        text: int(token)
        for text, token in pairs
        if isinstance(text, str) and str(token).isdecimal() and len(str(token)) < 10
    }


def _odd_key(value: Any) -> str | None:
    """Return a key that cannot be shown in a message; tokens may be such keys, settings not."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if odd := [key for key in node if not key.isprintable()]:
                return odd[0]
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return None


def _read_files(
    folder: Path, names: list[str], *, allow_pickle: bool
) -> tuple[dict[str, dict[str, mx.array]], dict[str, Any]]:
    """Open the tensor files; return their tensors by file, and the plain values."""
    files: dict[str, dict[str, mx.array]] = {}
    values: dict[str, Any] = {}
    differing: set[str] = set()
    for name in names:
        if name.endswith(".safetensors"):
            files[name] = read_safetensors(folder / name)
            continue
        files[name], new_values = _read_torch_file(folder / name, allow_pickle=allow_pickle)
        known = new_values.keys() & values.keys()
        differing |= {key for key in known if values[key] != new_values[key]}
        values |= new_values
    # Values on which two files disagree (an epoch, for example) are omitted.
    return files, {key: value for key, value in values.items() if key not in differing}


def _read_torch_file(
    path: Path, *, allow_pickle: bool
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    # Imported here: the module is not needed for safetensors.
    from mlx_mtp.converters.pytorch.checkpoint import torch_to_safetensors

    with tempfile.TemporaryDirectory(prefix="mlx-mtp.") as scratch:
        written, values = torch_to_safetensors(path, Path(scratch), allow_pickle=allow_pickle)
        # MLX keeps the file open, so the tensors can be read after its deletion.
        return read_safetensors(written), values


def _check_indexes(folder: Path, files: Mapping[str, Mapping[str, mx.array]]) -> None:
    """Check that every tensor of an index is in the file that it names."""
    for path in sorted(folder.glob("*.index.json")):
        if _belongs_to(path, files):
            for tensor, name in read_index(path).items():
                if tensor not in files.get(name, {}):
                    raise ValueError(f"{path}: {shown(tensor)} is not in {name}")


def _belongs_to(index: Path, files: Mapping[str, object]) -> bool:
    """Return whether an index refers to files that are read; a .bin index may be left over."""
    return any(index.name.endswith(f"{Path(name).suffix}.index.json") for name in files)
