"""The child process that reads one PyTorch file: import torch, enter the sandbox, then look at it.

The tensors are written to ``tensors.safetensors`` in the scratch folder, one after the other, and
the rest to ``result.json``: ``{"error": text or null, "values": {name: value}}``.  The parent
process trusts neither file and checks both.

``read_confined`` does all the work.  ``checkpoint`` calls it in a fresh interpreter; a test may
call it in a forked process that has imported torch and has one thread.
"""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_mtp.converters.pytorch import sandbox

TENSORS_FILE = "tensors.safetensors"
RESULT_FILE = "result.json"
# One storage may be written under several names, so the output may be longer than the file.
MAX_GROWTH = 4
MAX_VALUES = 10_000
MAX_TEXT = 1024
MAX_LIST = 4096
_MAX_DEPTH = 16
_MAX_NODES = 200_000
_MAX_DIMENSIONS = 8
_SLICE_BYTES = 64 << 20
_SLACK_BYTES = 1 << 20
# Older versions do not check the pickle's instructions and the sizes of storages well enough: a
# file could corrupt memory, or run code, in spite of weights_only (CVE-2025-32434, CVE-2026-24747).
_OLDEST_TORCH = (2, 10)

_DTYPES = {
    **{"bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16"},
    **{"uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16"},
    **{"bfloat16": "BF16", "float32": "F32", "float64": "F32", "complex64": "C64"},
}
# States of training that a checkpoint of weights may contain.
_NOT_WEIGHTS = ("optim", "sched", "lr_sched", "rng", "scaler", "grad_scaler")


def max_output_bytes(file_bytes: int) -> int:
    """Return the maximum size of the tensor file for a PyTorch file of this size."""
    return MAX_GROWTH * file_bytes + _SLACK_BYTES


def read_confined(
    path: Path,
    scratch: Path,
    *,
    is_zip: bool,
    limits: sandbox.Limits,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Enter the sandbox and read one file; the process remains confined afterwards.

    Args:
        path: the PyTorch file.
        scratch: folder for the two result files, the only one that remains writable.
        is_zip: whether the file is a zip archive, whose storages can be mapped.
        limits: limits of memory, time and file size.
        ready: called in the sandbox, before the file is looked at.
    """
    values: dict[str, Any] = {}
    try:
        torch = _import_torch(scratch)
        sandbox.enter(scratch, readable=[path], limits=limits)
        ready()
        tensors, values = _flatten(_load(torch, path, is_zip=is_zip), torch=torch)
        _check_tensors(tensors, torch=torch, file_bytes=path.stat().st_size)
        _write_tensors(scratch / TENSORS_FILE, tensors, torch=torch)
        error = None
    except BaseException as problem:  # any failure is reported to the parent
        error = _reason(problem)
    result = {"error": error, "values": {} if error else values}
    (scratch / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")


def main(request: str) -> None:
    """Serve one request of ``torch_checkpoint`` and exit."""
    fields = json.loads(request)

    def ready() -> None:
        os.write(fields["ready"], b"R")

    read_confined(
        Path(fields["path"]),
        Path(fields["scratch"]),
        is_zip=fields["is_zip"],
        limits=sandbox.Limits(**fields["limits"]),
        ready=ready,
    )
    os._exit(0)


def _import_torch(scratch: Path) -> Any:
    """Import torch and load a sample, so that nothing is imported later in the sandbox."""
    import torch

    warnings.simplefilter("ignore")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ValueError(f"PyTorch {torch.__version__} is too old to read it safely: use {oldest}")
    torch.set_num_threads(1)
    sample = scratch / "sample.pt"
    torch.save({"sample": torch.zeros(2)}, sample)
    _load(torch, sample, is_zip=True)
    sample.unlink()
    return torch


def _load(torch: Any, path: Path, *, is_zip: bool) -> Any:
    return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)


def _flatten(loaded: Any, *, torch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what was loaded into tensors and plain values, both by dotted name."""
    if not isinstance(loaded, dict):
        raise ValueError(f"it contains a {type(loaded).__name__}, not a dict of tensors")
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    waiting: list[tuple[str, Any, int]] = [("", loaded, 0)]
    nodes = 0
    while waiting:
        prefix, node, depth = waiting.pop()
        # Not node.items(): a pickle may give an OrderedDict an attribute of that name.
        items = dict.items(node) if isinstance(node, dict) else enumerate(node)
        nodes += len(node)
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            raise ValueError("its dicts are nested too deeply or too large")
        for key, value in items:
            name = _join(prefix, key)
            if _is_training_state(key):
                continue
            if isinstance(value, torch.Tensor):
                if name in tensors:
                    raise ValueError(f"two of its tensors are named {name}")
                tensors[name] = value
            elif _is_plain(value):
                if len(values) < MAX_VALUES:
                    values[name] = value
            elif isinstance(value, dict | list | tuple):
                waiting.append((name, value, depth + 1))
    return tensors, values


def _join(prefix: str, key: Any) -> str:
    if not isinstance(key, str | int) or isinstance(key, str) and not key.isprintable():
        raise ValueError(f"it has a key of type {type(key).__name__}, which is not a valid name")
    if len(prefix) + len(str(key)) >= MAX_TEXT:
        raise ValueError(f"a name in it is longer than {MAX_TEXT} characters")
    return f"{prefix}.{key}" if prefix else str(key)


def _is_training_state(key: Any) -> bool:
    return isinstance(key, str) and (key.startswith(_NOT_WEIGHTS) or key.endswith("rng_state"))


def _is_plain(value: Any) -> bool:
    """Return whether this is one small plain value or a short list of such values."""
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LIST and all(_is_scalar(item) for item in value)
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isprintable()
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, float)


def _check_tensors(tensors: Mapping[str, Any], *, torch: Any, file_bytes: int) -> None:
    """Refuse tensors that are not simply bytes of the file."""
    total = 0
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise ValueError(f"tensor {name} has type {kind}, which cannot be converted")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"tensor {name} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"tensor {name} is sparse, quantised or has no data")
        if tensor.dim() > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {tensor.dim()} dimensions")
        elements = 1 + sum(
            (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        elements = tensor.storage_offset() + max(elements, tensor.numel()) if tensor.numel() else 0
        storage = tensor.untyped_storage().nbytes()
        if elements * tensor.element_size() > storage or storage > file_bytes:
            raise ValueError(f"tensor {name} of shape {list(tensor.shape)} exceeds its storage")
        total += tensor.numel() * tensor.element_size()
    if total > max_output_bytes(file_bytes) - _SLACK_BYTES:
        raise ValueError(f"its tensors would fill {total} bytes, the file has {file_bytes}")


def _write_tensors(path: Path, tensors: Mapping[str, Any], *, torch: Any) -> None:
    """Write a safetensors file with one tensor in memory at a time; float64 as float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if name in header:
            raise ValueError(f"{name} is not a valid tensor name")
        wide = tensor.dtype == torch.float64
        start, end = end, end + tensor.numel() * (4 if wide else tensor.element_size())
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        shape = list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            _write_tensor(file, tensor, torch=torch)


def _write_tensor(file: Any, tensor: Any, *, torch: Any) -> None:
    tensor = tensor.detach()
    if tensor.dtype == torch.float64:
        tensor = tensor.to(torch.float32)
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    step = max(1, _SLICE_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        file.write(memoryview(flat[start : start + step].view(torch.uint8).numpy()))


# What torch says, and what is shown instead; the first match counts.
_REASONS = (
    (
        r"(?i:unsupported global): GLOBAL (\S+)|unsupported GLOBAL (\S+) whose module",
        "it refers to {}, which is not plain weights; save its state_dict alone",
    ),
    (
        r"Unsupported operand (\d+)",
        "its pickle uses instruction {}, which plain weights never need",
    ),
    (r"TorchScript archives", "it is a TorchScript program, not a checkpoint"),
    (r"\.tar format", "it is a tar archive, not a checkpoint"),
    (r"alloc_cpu|allocate memory", "it needs too much memory"),
    (r"PytorchStreamReader|enforce fail|hasRecord", "it is a broken or truncated zip archive"),
)


def _reason(problem: BaseException) -> str:
    """Return one line that explains why the file cannot be read."""
    if isinstance(problem, MemoryError):
        return "it needs too much memory"
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, KeyError | AttributeError | IndexError | EOFError | struct.error):
        return f"its pickle is broken ({type(problem).__name__} {problem})"[:MAX_TEXT]
    # torch wraps the reason in advice, part of which is to read the file without weights_only.
    before, wrapped, after = str(problem)[: 64 * MAX_TEXT].partition("WeightsUnpickler error:")
    text = after if wrapped else before
    for pattern, reason in _REASONS:
        if match := re.search(pattern, text):
            return reason.format(next(filter(None, match.groups()), ""))[:MAX_TEXT]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Weights only load failed"):
        del lines[0]
    sentence = lines[0].partition(". ")[0] if lines else type(problem).__name__
    return sentence[:MAX_TEXT].rstrip(".")
