"""Native MTP modules of a base model: kept in a file next to its weights, which mlx-lm ignores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.model.native.module import NativeModule
from mlx_mtp.model.native.stored import (
    NATIVE_FILE,
    ReadModules,
    check_complete,
    find_native,
    precision,
    quantise_native,
    read_native,
    write_native,
)
from mlx_mtp.model.parts import text_model
from mlx_mtp.storage.safetensors import shown
from mlx_mtp.storage.weights import listed_tensors

_LOOKS_NATIVE = re.compile(r"(?i)(^|[._])(mtp|nextn)([._\d]|$)")
_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class ConvertedModules:
    """What became of a model's native modules.

    Attributes:
        num_modules: how many were written.
        num_bytes: size of their tensors.
        precision: ``8-bit``, or the type of their matrices.
        dropped: why a tensor was not written, by its name in the source.
    """

    num_modules: int
    num_bytes: int
    precision: str
    dropped: Mapping[str, str]

    def lines(self) -> list[str]:
        """Describe the modules and name every tensor that was dropped."""
        lines = []
        if self.num_modules:
            size = f"{self.num_bytes / 1e6:.1f} MB"
            lines.append(
                f"native MTP modules: {self.num_modules} in {NATIVE_FILE}, {self.precision}, {size}"
            )
        lines += [f"dropped {names}: {why}" for names, why in _grouped(self.dropped)]
        return lines


def read_modules(staged: Path, source: Path, model: Any, config: Mapping[str, Any]) -> ReadModules:
    """Read the native modules of a model, their weights lazily.

    Args:
        staged: folder with links to the model's checked files.
        source: its own folder, for messages.
        model: the mlx-lm model.
        config: its ``config.json``.

    Raises:
        ValueError: they are broken, or those of another model.
    """
    check_complete(source, find_native(source, config))  # its index is not in the staged folder
    try:
        read = read_native(staged, model, config)
        parameters: Any = tree_flatten(model.parameters())
        used = {name for name, _ in parameters}
        listed = listed_tensors(staged, extra="*.safetensors")
    except ValueError as error:
        raise ValueError(str(error).replace(str(staged), str(source))) from None
    found = find_native(staged, config)
    known = set() if found is None else set(found.files)
    layers = len(text_model(model).layers)
    others = [
        name
        for name in listed
        if name not in known | used
        and (
            _LOOKS_NATIVE.search(name)
            or ((match := _LAYER.match(name)) and int(match[1]) >= layers)
        )
    ]
    unknown = dict.fromkeys(others, "config.json announces no such native module")
    return ReadModules(native=read.native, dropped=read.dropped | unknown)


def write_modules(
    read: ReadModules,
    output: Path,
    model: Any,
    config: Mapping[str, Any],
    *,
    bits: int | None,
    group_size: int | None,
) -> ConvertedModules | None:
    """Write native modules into a model's folder, quantised if there are ``bits``.

    Args:
        read: what ``read_modules`` returned.
        output: the folder.
        model: the mlx-lm model, not quantised yet.
        config: its ``config.json``.
        bits: bits per weight; None keeps the type of the weights.
        group_size: weights per scale.

    Returns:
        What was written and dropped; None if the model has no native modules.
    """
    native, num_bytes, kind = read.native, 0, ""
    if native is None and not read.dropped:
        return None
    count = 0 if native is None else native.num_modules
    if native is not None:
        if bits is not None and group_size is not None:
            quantise_native(native, model, bits=bits, group_size=group_size)
        num_bytes = _write(native, output, model)
        found = find_native(output, config)
        assert found is not None
        kind = precision(found, config)
    return ConvertedModules(
        num_modules=count, num_bytes=num_bytes, precision=kind, dropped=read.dropped
    )


def _write(native: NativeModule, output: Path, model: Any) -> int:
    try:
        return write_native(output / NATIVE_FILE, native, model)
    except RuntimeError as error:  # MLX, when a file cannot be read or memory is short
        raise ValueError(f"cannot convert the native modules: {shown(error)}") from None
    finally:
        mx.clear_cache()


def _grouped(dropped: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Join names that differ in a number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in dropped.items():
        groups.setdefault((_NUMBER.sub("*", name), why), []).append(name)
    for (pattern, why), names in groups.items():
        many = f"{shown(pattern)} ({len(names)} tensors)"
        yield (shown(names[0]) if len(names) == 1 else many), why
