"""Results that are remembered per machine and model: JSON files in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlx_mtp.storage.files import write_atomically
from mlx_mtp.storage.paths import cache_dir

_KEY_FIELD = "made_for"

T = TypeVar("T")


class KeyedCache:
    """One cached result, valid only for exactly the machine, model and versions in its key.

    Attributes:
        digest: hash of the key; names the file and is repeated inside it, so that a file copied
            or renamed from another machine is a miss.

    Args:
        name: subfolder of the cache folder, e.g. ``costs``.
        key: everything that the result depends on: device, versions, settings, weight shapes.
    """

    def __init__(self, name: str, key: Iterable[str]) -> None:
        self.digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:24]
        self._name = name

    @property
    def path(self) -> Path:
        """The file, whether it exists or not."""
        return cache_dir() / self._name / f"{self.digest}.json"

    def read(self, decode: Callable[[dict[str, Any]], T]) -> T | None:
        """Return the cached result.

        Args:
            decode: builds the result from the values passed to ``write``; it may raise
                ValueError, KeyError, TypeError or AttributeError for values it cannot use.

        Returns:
            None if there is no file, it cannot be read or decoded, or it has another key.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values.pop(_KEY_FIELD) == self.digest:
                return decode(values)
        return None

    def write(self, values: Mapping[str, Any]) -> None:
        """Store JSON-ready values, atomically; a cache that cannot be written stays as it is."""
        with contextlib.suppress(OSError):
            text = json.dumps({_KEY_FIELD: self.digest} | dict(values), indent=2)
            write_atomically(self.path, text + "\n")
