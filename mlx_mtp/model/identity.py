"""A hash of everything that a loaded model computes with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

_NUM_THREADS = 4


def model_identity(model: nn.Module) -> str:
    """Hash the weights and every plain setting of all modules of a model.

    Models with the same hash give the same keys and values for the same ids on the same device.
    ``mtp_model.fingerprint`` instead identifies a trained model whatever its quantisation.
    """
    digest = hashlib.sha256()
    arrays: list[mx.array] = []
    for path, module in sorted(model.named_modules(), key=lambda item: item[0]):
        kind = type(module)
        digest.update(f"{path} {kind.__module__}.{kind.__qualname__}\n".encode())
        for name, value in sorted({**vars(module), **module}.items()):
            for part in _parts(value):
                if isinstance(part, mx.array):
                    arrays.append(part)
                    part = f"{part.dtype} {part.shape}"
                digest.update(f"{name} {part}\n".encode())
    arrays = [mx.contiguous(array) for array in arrays]
    mx.eval(arrays)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for content in pool.map(_hashed, arrays):
            digest.update(content)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[mx.array | str]:
    """What counts of an attribute: of functions the name, of other objects the type."""
    if isinstance(value, mx.array):
        yield value
    elif value is None or isinstance(value, bool | int | float | str):
        yield repr(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parts(
            {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        )
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, dict) and not isinstance(value, nn.Module):
        for key in sorted(value, key=str):
            yield str(key)
            yield from _parts(value[key])
    elif isinstance(value, functools.partial):
        yield from _parts([value.func, value.args, value.keywords])
    else:
        yield f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def _hashed(array: mx.array) -> bytes:
    return hashlib.sha256(memoryview(cast(Any, array))).digest()
