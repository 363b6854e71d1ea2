"""Native modules in a model's folder: found, read, and written to a file next to the model's.

``convert`` writes them to ``mtp.safetensors``, under their canonical names (``names``) and with
metadata that say which model they are of.  Unconverted folders have them among the model's own
tensors, and so have those of other tools, or in files of their own, which the index may leave out.
mlx-lm drops them in either case, so they are looked for by name, and only their files are opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_mtp.model.fingerprint import fingerprint, is_fingerprint_of
from mlx_mtp.model.native.module import NativeModule, build_native_module
from mlx_mtp.model.native.names import (
    belongs_to_modules,
    family_of,
    module_indices,
    native_tensors,
)
from mlx_mtp.model.native.published import canonical_tensors, without_copies
from mlx_mtp.model.parts import text_model
from mlx_mtp.storage.safetensors import (
    READABLE,
    TensorInfo,
    check_safetensors,
    load_safetensors,
    read_metadata,
    shown,
)
from mlx_mtp.storage.shards import write_file
from mlx_mtp.storage.weights import SAFETENSORS_INDEX, listed_tensors

NATIVE_FILE = "mtp.safetensors"
EXTRA_FILES = "*mtp*.safetensors"  # of native modules, as this and other tools call them

_VERSION_KEY, _VERSION = "mlx_mtp_native", "1"
_PREFIX = "predictors."
_FP8 = {"F8_E4M3", "F8_E5M2", "F8_E8M0"}  # unpacked by ``sanitize`` of some of mlx-lm's classes
_TYPES = dict.fromkeys(_FP8, "float8") | {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
}
_INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class StoredModules:
    """Native modules that a model's folder has, from names and headers.

    Attributes:
        is_supported: whether this program knows their family.
        files: file of each tensor, by its name there.
        missing: the file that the index gives for each tensor that is not there.
        infos: headers' entries of the tensors that are there.
        metadata: that of ``mtp.safetensors``, if ``convert`` wrote it; its names are canonical.
        indices: numbers of the modules.
    """

    is_supported: bool
    files: dict[str, Path]
    missing: dict[str, str]
    infos: dict[str, TensorInfo]
    metadata: dict[str, str] | None
    indices: list[int]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors that are there."""
        return sum(info.num_bytes for info in self.infos.values())

    @property
    def has_own_files(self) -> bool:
        """Whether some are in files of native modules, not among the model's own tensors."""
        return any(path.match(EXTRA_FILES) for path in self.files.values())

    @property
    def is_converted(self) -> bool:
        """Whether ``convert`` wrote them."""
        return self.metadata is not None


@dataclass(frozen=True, kw_only=True)
class ReadModules:
    """Native modules that were read, their weights lazily.

    Attributes:
        native: the modules; None if they cannot be used.
        dropped: why a tensor is not in them, by its name in the checkpoint.
    """

    native: NativeModule | None
    dropped: dict[str, str]


def find_native(folder: Path, config: Mapping[str, Any]) -> StoredModules | None:
    """Find the native modules of a model's folder; no tensor is read.

    Args:
        folder: the model's folder.
        config: its ``config.json``.

    Returns:
        What there is, None if there is nothing.

    Raises:
        ValueError: a header or the index is broken; one line that names the file.
    """
    path = folder / NATIVE_FILE
    if path.is_file() and _VERSION_KEY in (metadata := read_metadata(path)):
        infos = check_safetensors(path)
        return StoredModules(
            is_supported=True,
            files=dict.fromkeys(infos, path),
            missing={},
            infos=infos,
            metadata=metadata,
            indices=module_indices(infos),
        )
    listed = listed_tensors(folder, extra=EXTRA_FILES)
    places = {name: place for name, place in listed.items() if belongs_to_modules(name, config)}
    if not places:
        return None
    headers = {p: check_safetensors(p) for p in sorted(set(places.values())) if p.is_file()}
    files = {name: p for name, p in places.items() if name in headers.get(p, {})}
    return StoredModules(
        is_supported=family_of(config) is not None,
        files=files,
        missing={name: p.name for name, p in places.items() if name not in files},
        infos={name: headers[p][name] for name, p in files.items()},
        metadata=None,
        indices=module_indices(native_tensors(places, config).values()),
    )


def check_complete(folder: Path, found: StoredModules | None) -> None:
    """Refuse a folder whose index lists tensors of native modules that are not there.

    Args:
        folder: the model's folder.
        found: what ``find_native`` found in it.

    Raises:
        ValueError: one line that names the index and the file.
    """
    if found is None or not found.missing:
        return
    names = sorted(set(found.missing.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    where = f"{absent[0]}, which is missing" if absent else f"{names[0]}, which does not have them"
    count = sum(name == (absent or names)[0] for name in found.missing.values())
    raise ValueError(
        f"{folder / SAFETENSORS_INDEX} lists {count} tensors of native MTP modules in {where}: "
        "download it again"
    )


def read_native(folder: Path, base: Any, config: Mapping[str, Any]) -> ReadModules:
    """Read the native modules of a model's folder, their weights lazily.

    Args:
        folder: the model's folder.
        base: the mlx-lm model, as ``open_base`` returned it.
        config: its ``config.json``.

    Raises:
        ValueError: tensors are missing or broken, or the modules are those of another model; one
            line that names the file.
    """
    found = find_native(folder, config)
    check_complete(folder, found)
    if found is None:
        return ReadModules(native=None, dropped={})
    if found.is_converted:
        return ReadModules(native=_read_converted(found, base, config), dropped={})
    if not found.is_supported:
        why = f"native modules of {text_model(base).model_type} models are not supported"
        return ReadModules(native=None, dropped=dict.fromkeys(found.files, why))
    try:
        return _read_published(found, base, config)
    except ValueError as error:
        if found.has_own_files:
            path = next(path for path in found.files.values() if path.match(EXTRA_FILES))
            raise ValueError(f"{path} does not fit the model: {error}") from None
        return ReadModules(native=None, dropped=dict.fromkeys(found.files, str(error)))


def write_native(path: Path, native: NativeModule, base: Any) -> int:
    """Write native modules to a file and remove their weights from memory.

    Args:
        path: the file.
        native: the modules.
        base: their mlx-lm model, with the weights that its folder gets before quantisation.

    Returns:
        The size of the tensors in bytes.

    Raises:
        OSError: the file cannot be written.
    """
    base = text_model(base)
    metadata = {
        "format": "mlx",
        _VERSION_KEY: _VERSION,
        "model_type": base.model_type,
        "num_modules": str(native.num_modules),
        "base_fingerprint": fingerprint(base),
    }
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(native.parameters()))
    tensors = {name.removeprefix(_PREFIX): value for name, value in parameters}
    del parameters
    native.update(tree_map(lambda _: mx.array([]), native.parameters()))
    return write_file(path, tensors, metadata=metadata)


def quantise_native(native: NativeModule, base: Any, *, bits: int, group_size: int) -> None:
    """Quantise what is not quantised yet and whose width the groups divide, lazily.

    Layers that mlx-lm does not quantise in the model, or in another way, are treated likewise.
    """
    predicate = getattr(base, "quant_predicate", None) or (lambda path, module: True)

    def chosen(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        return predicate(path, module)

    nn.quantize(native, group_size, bits, class_predicate=chosen)


def precision(found: StoredModules, config: Mapping[str, Any]) -> str:
    """Return how the projection of the first module is stored: ``8-bit``, or its type."""
    names = {name: name for name in found.files}
    canonical = names if found.is_converted else native_tensors(names, config)
    for name, info in found.infos.items():
        if canonical.get(name) == "0.projection.weight":
            if info.dtype == "U32" and len(info.shape) == 2 and info.shape[0]:
                return f"{16 * info.shape[1] // info.shape[0]}-bit"
            return _TYPES.get(info.dtype, info.dtype)
    return "unknown"


def _read_converted(found: StoredModules, base: Any, config: Mapping[str, Any]) -> NativeModule:
    """Read what ``convert`` wrote, if it is this model's."""
    assert found.metadata is not None
    metadata, path = found.metadata, next(iter(found.files.values()), Path(NATIVE_FILE))
    if metadata[_VERSION_KEY] != _VERSION:
        raise ValueError(
            f"{path} was written by another version of mlx-mtp: convert the model again"
        )
    kind = text_model(base).model_type
    if metadata.get("model_type") != kind:
        raise ValueError(
            f"{path} has native modules of a {shown(metadata.get('model_type'))} model, "
            f"this is a {kind} model"
        )
    if not is_fingerprint_of(base, written := metadata.get("base_fingerprint", "")):
        raise ValueError(
            f"{path} has native modules of another {kind} model (fingerprint "
            f"{shown(written[:12])}), not of this one (fingerprint {fingerprint(base)[:12]})"
        )
    try:
        return build_native_module(base, _load(found), config)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None


def _read_published(found: StoredModules, base: Any, config: Mapping[str, Any]) -> ReadModules:
    """Read modules as their checkpoint or another tool has them."""
    for name, info in found.infos.items():
        if info.dtype not in READABLE and info.dtype not in _FP8:
            raise ValueError(f"{name} has type {info.dtype}, which MLX cannot read")
    published = _load(found)
    tensors = canonical_tensors(base, published, config)
    unused = _unused(base, published, tensors, config)
    kept, copies = without_copies(base, tensors)
    dropped = dict.fromkeys(unused, f"mlx-lm's {text_model(base).model_type} has no use for it")
    canonical = native_tensors(published, config)
    for name in published:
        if canonical[name] in copies:
            part = canonical[name].split(".")[1]
            dropped[name] = f"it equals the model's own {part}, which is used"
    return ReadModules(native=build_native_module(base, kept, config), dropped=dropped)


def _unused(
    base: Any,
    published: Mapping[str, mx.array],
    tensors: Mapping[str, mx.array],
    config: Mapping[str, Any],
) -> list[str]:
    """Find tensors without which ``canonical_tensors`` returns the same as with them.

    Tensors whose names differ only in a number, such as experts', are left out together.
    """
    groups: dict[str, list[str]] = {}
    for name, canonical in native_tensors(published, config).items():
        if canonical not in tensors:
            groups.setdefault(_INDEX.sub(".#.", canonical), []).append(name)
    whole, unused = _signature(tensors), list[str]()
    for names in groups.values():
        others = {name: value for name, value in published.items() if name not in set(names)}
        try:
            is_used = _signature(canonical_tensors(base, others, config)) != whole
        except (KeyError, ValueError, IndexError):
            is_used = True
        unused += [] if is_used else names
    return unused


def _signature(tensors: Mapping[str, mx.array]) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def _load(found: StoredModules) -> dict[str, mx.array]:
    """Open the files of the modules' tensors, which are read when they are first used."""
    tensors: dict[str, mx.array] = {}
    for path in sorted(set(found.files.values())):
        loaded = load_safetensors(path)
        tensors |= {name: loaded[name] for name, place in found.files.items() if place == path}
    return tensors
