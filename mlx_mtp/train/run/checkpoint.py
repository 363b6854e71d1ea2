"""Files of a training run: states to resume from, and the best adapter so far.

A state is a folder ``state-0000100`` of two files: all tensors, bit for bit, and a JSON file with
everything else and the hashes of both.  It is written under another name, synced to the disk and
renamed, so that a kill at any moment leaves the earlier states intact; the next write removes
what a killed one left.  One process at a time writes to a folder (see ``history``).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.model.adapter_file import file_shapes, from_file, to_file
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, HeadsConfig, MTPConfig
from mlx_mtp.model.statistics import STATISTICS_FILE, AdapterStatistics, write_statistics
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.storage.safetensors import check_safetensors, read_json_object

TENSORS_FILE = "state.safetensors"
VALUES_FILE = "state.json"
README_FILE = "README.md"
RAW, EMA = "raw", "ema"  # the newest weights, and their exponential moving average
WEIGHTS = {RAW: "parameters.", EMA: "ema."}  # prefixes of a state's tensors
OPTIMISER = "optimizer."  # likewise

_FORMAT = 1
_STATE = re.compile(r"state-(\d{7,})")
_DRAFT, _ASIDE = ".state-new", ".state-old"
_DTYPES = {
    **{"BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16},
    **{"F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "I32": mx.int32},
    **{"F32": mx.float32, "U64": mx.uint64, "I64": mx.int64, "F64": mx.float64},
    "C64": mx.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Bits are copied as integers: NumPy has no bfloat16, and NaNs must keep their payload.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a run needs to resume bit for bit.

    Attributes:
        step: number of training steps.
        tensors: weights and optimiser state by name, of any MLX type.
        values: everything else, as JSON: tuples become lists.
    """

    step: int
    tensors: dict[str, mx.array]
    values: dict[str, Any]


def save_state(folder: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write ``state-<step>`` into a folder atomically, then remove old states.

    Args:
        folder: of the states; created if missing.
        state: to write.
        keep: number of states to keep, including the new one.

    Returns:
        The new folder.

    Raises:
        ValueError: ``values`` cannot be written as JSON, or ``keep`` is below 1.
        OSError: it cannot be written; the earlier states are unchanged.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder.mkdir(parents=True, exist_ok=True)
    target, draft, aside = folder / state_name(state.step), folder / _DRAFT, folder / _ASIDE
    _remove([draft, aside])
    try:
        draft.mkdir()
        digest = _write_tensors(draft / TENSORS_FILE, state.tensors)
        _write_bytes(draft / VALUES_FILE, [_values_text(state, digest).encode()])
        _sync(draft)
        if target.exists():
            os.rename(target, aside)
        os.rename(draft, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        _remove([draft])
        raise
    _sync(folder)
    # Later steps are from before the run was resumed at an earlier one.
    _remove(folder / state_name(step) for step in state_steps(folder) if step > state.step)
    remove_old_states(folder, state.step, keep=keep)
    return target


def remove_old_states(folder: Path, step: int, *, keep: int = 2) -> None:
    """Remove old states up to a step, and incomplete ones of killed calls.

    Args:
        folder: of the states.
        step: of an intact state.
        keep: number of states to keep, including that one.
    """
    older = [number for number in state_steps(folder) if number <= step][:-keep]
    drafts = [folder / _DRAFT, folder / _ASIDE]
    _remove([*drafts, *(folder / state_name(number) for number in older)])


def newest_state(folder: Path, *, log: Callable[[str], None] | None = None) -> TrainState | None:
    """Read the newest intact state of a folder, or return None.

    Args:
        folder: of the states; it need not exist.
        log: called with a line for every damaged state that is skipped.
    """
    for step in reversed(state_steps(folder)):
        path = folder / state_name(step)
        try:
            return read_state(path)
        except (ValueError, OSError) as error:
            if log is not None:
                log(f"{path} is damaged and was skipped: {error}")
    return None


def state_name(step: int) -> str:
    """Name of the folder of a state."""
    return f"state-{step:07d}"


def save_adapter(
    folder: Path,
    config: MTPConfig | HeadsConfig,
    weights: Mapping[str, mx.array],
    *,
    readme: str | None = None,
    statistics: AdapterStatistics | None = None,
    dtype: mx.Dtype = mx.float16,
) -> None:
    """Write an adapter folder, so that a loader never finds weights with another configuration.

    Each file is replaced atomically.  A different configuration is removed before the weights
    change, and the new one is written last; in between the folder is not an adapter folder.
    Statistics of other weights are removed too.

    Args:
        folder: created if missing.
        config: the adapter's configuration, which decides what is quantised.
        weights: by name, see ``adapter_file.to_file``.
        readme: text of ``README.md``; None does not change it.
        statistics: of these weights, if they were evaluated.
        dtype: type of the tensors in the file that are not quantised.

    Raises:
        ValueError: a tensor is not finite in that type; nothing is written.
        OSError: a file cannot be written; it is unchanged.
    """
    tensors = to_file(weights, config, dtype=dtype)
    finite = {name: mx.isfinite(value).all() for name, value in from_file(tensors, config).items()}
    mx.eval(tensors, finite)
    for name, is_finite in finite.items():
        if not is_finite.item():
            raise ValueError(f"{name} contains values that {_DTYPE_NAMES[dtype]} cannot represent")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{WEIGHTS_FILE}.new"
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    try:
        _write_tensors(draft, tensors)
        same = _text(folder / CONFIG_FILE) == text
        if not same:
            (folder / CONFIG_FILE).unlink(missing_ok=True)
        (folder / STATISTICS_FILE).unlink(missing_ok=True)
        os.replace(draft, folder / WEIGHTS_FILE)
    finally:
        draft.unlink(missing_ok=True)
    if statistics is not None:
        write_statistics(folder, statistics)
    if not same:
        write_atomically(folder / CONFIG_FILE, text)
    if readme is not None:
        write_atomically(folder / README_FILE, readme)
    _sync(folder)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        ValueError: the values cannot be written as JSON.
        OSError: it cannot be written; it is unchanged.
    """
    write_atomically(path, _json(values, where=path.name, indent=2) + "\n")


def under(prefix: str, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Tensors whose names have a prefix, without it, sorted by name."""
    names = sorted(name for name in tensors if name.startswith(prefix))
    return {name.removeprefix(prefix): tensors[name] for name in names}


def _values_text(state: TrainState, tensors_sha256: str) -> str:
    """The JSON file of a state, with a hash of its content."""
    content = {
        "format": _FORMAT,
        "step": state.step,
        "tensors_sha256": tensors_sha256,
        "values": state.values,
    }
    digest = hashlib.sha256(_json(content, where="values").encode()).hexdigest()
    return _json(content | {"sha256": digest}, where="values", indent=1) + "\n"


def is_state(path: Path) -> bool:
    """Whether a path names weights of a state, see ``state_weights``."""
    return _STATE.fullmatch(state_weights(path)[0].name) is not None


def state_weights(path: Path) -> tuple[Path, str]:
    """The folder and the weights that ``state-0000100`` (raw) or ``state-0000100/ema`` name."""
    return (path.parent, path.name) if path.name in WEIGHTS else (path, RAW)


def read_state(path: Path) -> TrainState:
    """Read a state, a folder named by ``state_name``.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    step = int(path.name.removeprefix("state-"))
    content = read_json_object(path / VALUES_FILE)
    digest = content.pop("sha256", None)
    if hashlib.sha256(_json(content, where="values").encode()).hexdigest() != digest:
        raise ValueError(f"{VALUES_FILE} does not match its hash")
    if content["format"] != _FORMAT or content["step"] != step:
        raise ValueError(f"{VALUES_FILE} has another format or step")
    tensors = _read_tensors(path / TENSORS_FILE, sha256=content["tensors_sha256"])
    return TrainState(step=step, tensors=tensors, values=content["values"])


def _write_tensors(path: Path, tensors: Mapping[str, mx.array]) -> str:
    """Write a safetensors file and sync it to the disk; return its sha256.

    ``mx.save_safetensors`` lacks float64 and does not report why a write failed.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, _ = _header((name, tensors[name].shape, tensors[name].dtype) for name in order)
    parts = (_bits(tensors[name]) for name in order)
    return _write_bytes(path, [struct.pack("<Q", len(header)), header], parts)


def _header(infos: Iterable[tuple[str, tuple[int, ...], mx.Dtype]]) -> tuple[bytes, int]:
    """The header of a safetensors file, and the number of bytes of the tensors after it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, shape, dtype in infos:
        start, end = end, end + math.prod(shape) * dtype.size
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % 8), end


def adapter_file_bytes(
    shapes: Mapping[str, tuple[int, ...]], config: MTPConfig | HeadsConfig
) -> int:
    """Number of bytes of the weights file that ``save_adapter`` writes.

    Args:
        shapes: those of the weights by name.
        config: the adapter's configuration.
    """
    infos = list(file_shapes(shapes, config))
    header, data = _header(sorted(infos, key=lambda info: (-info[2].size, info[0])))
    return 8 + len(header) + data


def _read_tensors(path: Path, *, sha256: str) -> dict[str, mx.array]:
    """Read a safetensors file of any MLX type, after comparing its hash."""
    infos = check_safetensors(path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path.name} does not match its hash")
    tensors = {}
    for name, info in infos.items():
        dtype = _DTYPES[info.dtype]
        kind = np.dtype(f"<u{dtype.size}")
        bits = np.frombuffer(data, kind, info.num_bytes // dtype.size, offset=info.start)
        with mx.stream(mx.cpu):  # the only device with float64
            tensors[name] = mx.array(bits).view(dtype).reshape(info.shape)
    mx.eval(tensors)
    return tensors


def _bits(value: mx.array) -> bytes:
    with mx.stream(mx.cpu):
        flat = value.reshape(-1).view(_BITS[value.itemsize])
    return np.array(flat).tobytes()


def _write_bytes(path: Path, *parts: Iterable[bytes]) -> str:
    """Write a file and sync it to the disk; return its sha256."""
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for part in (piece for pieces in parts for piece in pieces):
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # a write has no file name
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    return digest.hexdigest()


def _json(values: Any, *, where: str, indent: int | None = None) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} is not JSON")

    try:
        return json.dumps(values, ensure_ascii=False, indent=indent, default=plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from None


def state_steps(folder: Path) -> list[int]:
    """Steps of the states in a folder, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_STATE.fullmatch, names) if match)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Sync a folder's entries to the disk, if the system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return None
