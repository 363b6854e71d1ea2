"""Original checkpoint files as torch tensors, for the PyTorch side of a verification."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
STATE_FILES = ("state", "optimizer", "scheduler", "training_args", "rng_state", "scaler")


@dataclass(frozen=True, kw_only=True)
class Original:
    """What a checkpoint holds.

    Attributes:
        tensors: by name, of all its files.
        configs: JSON objects beside them, by file name.
        values: plain values of PyTorch files, by dotted name.
    """

    tensors: dict[str, torch.Tensor]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def read_original(path: Path, *, scratch: Path, allow_pickle: bool) -> Original:
    """Read a checkpoint folder or file; PyTorch files go through the sandbox.

    Raises:
        ValueError: there is nothing to read, or a PyTorch file is not allowed.
    """
    from safetensors.torch import load_file

    folder = _follow(path) if path.is_dir() else path.parent
    files = _tensor_files(folder) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no tensors")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for file in files:
        if file.suffix in PICKLES:
            from mlx_mtp.converters.pytorch.checkpoint import torch_to_safetensors

            target = scratch / f"from-{file.name}"
            target.mkdir()
            file, found = torch_to_safetensors(file, target, allow_pickle=allow_pickle)
            values |= found
        tensors |= load_file(file)
    beside = ("adapter_config.json", "config.json", f"{path.stem}.json")
    configs = _json_objects(folder)
    if path.is_file():
        configs = {name: content for name, content in configs.items() if name in beside}
    return Original(tensors=tensors, configs=configs, values=values)


def _follow(folder: Path) -> Path:
    """The folder itself, the step that its ``latest.json`` points at, or its adapter."""
    pointer, name = folder / "latest.json", "adapter"
    if pointer.is_file():
        name = Path(str(json.loads(pointer.read_text(encoding="utf-8"))["latest"])).name
    elif (folder / "adapter_config.json").is_file() or not any((folder / name).glob("*.json")):
        return folder
    return folder / name if (folder / name).is_dir() else folder


def _tensor_files(folder: Path) -> list[Path]:
    """Safetensors files, and PyTorch files that have no safetensors twin."""
    safe = sorted(folder.glob("*.safetensors"))
    stems = {file.stem for file in safe}
    if any(name in stems for name in ("model", "adapter_model")):
        return safe
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    skipped = (*stems, *STATE_FILES)
    return safe + [file for file in pickles if file.stem not in skipped]


def _json_objects(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            found[file.name] = content
    return found
