"""A checkpoint of another project as plain data: tensors, JSON settings, plain values.

Safetensors files are read after a full check of their header.  PyTorch files are read in a
sandboxed child process, and only when the caller allows it.  Nothing here knows a layout, and no
code from a checkpoint ever runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What the files of a checkpoint hold.

    Attributes:
        path: the folder or file as it was given.
        configs: the JSON objects beside the tensors, by file name.
        files: the tensors by file name, then by tensor name; they are read when first used.
        values: plain values found in PyTorch files, by dotted name (``config.lora_rank``).
    """

    path: Path
    files: Mapping[str, Mapping[str, mx.array]]
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, mx.array]:
        """The tensors of all files by name.

        Raises:
            ValueError: two files hold a tensor of one name; the message names all three.
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


def read_checkpoint(
    path: Path, *, allow_pickle: bool = False, progress: Callable[[str], None] | None = None
) -> Checkpoint:
    """Read a checkpoint folder or file.

    Raises:
        ValueError: a file is missing, broken, refused or needs ``allow_pickle``; one line.
    """
    raise NotImplementedError
