"""Caches of finished answers, so that a prompt with the same beginning is not computed again.

No two answers ever write to one: a cache that an answer takes is taken out, or copied if much of it
would be lost, such as another branch of a conversation, or one that began with the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_mtp.model.cache import MTPCache

MAX_LOST = 32  # ids that a cache may lose when it is taken; a copy is taken if it would lose more
MIN_SHARED = 8  # with fewer shared ids no cache is taken


@dataclass(frozen=True)
class Entry:
    """A cache that no answer uses.

    Attributes:
        ids: the ids in it.
        cache: the keys and values.
        nbytes: their memory.
    """

    ids: list[int]
    cache: MTPCache
    nbytes: int


class PrefixCache:
    """Keeps the most recently used caches.

    Args:
        max_bytes: maximum memory of all together; 0 keeps none.
        max_entries: maximum number.
    """

    def __init__(self, *, max_bytes: int, max_entries: int = 16) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: list[Entry] = []  # the most recently used one last

    @property
    def nbytes(self) -> int:
        """Memory of the stored caches."""
        return sum(entry.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, ids: list[int]) -> tuple[MTPCache, int] | None:
        """Take the cache with the longest shared prefix, or a copy of it, rewound to that prefix.

        Returns:
            The cache and the number of ids in it, always fewer than ``ids`` has; None if no cache
            shares enough.
        """
        best: tuple[int, Entry] | None = None
        for entry in self._entries:
            shared = shared_prefix(entry.ids, ids[:-1])
            if shared >= MIN_SHARED and (best is None or shared >= best[0]):
                surplus = entry.cache.offset - shared
                best = (shared, entry) if entry.cache.can_rewind(surplus) else best
        if best is None:
            return None
        shared, entry = best
        self._entries.remove(entry)
        cache = entry.cache
        if cache.offset - shared > MAX_LOST:
            self._entries.append(entry)
            cache = cache.copied()
        cache.rewind(cache.offset - shared)
        return cache, shared

    def put(self, ids: list[int], cache: MTPCache) -> None:
        """Keep a cache of the first of ``ids``; drop the least recently used ones to make room."""
        ids = ids[: cache.offset]
        nbytes = cache_bytes(cache)
        if len(ids) < max(MIN_SHARED, cache.offset) or nbytes > self._max_bytes:
            return
        self._entries = [entry for entry in self._entries if entry.ids != ids[: len(entry.ids)]]
        self._entries.append(Entry(ids, cache, nbytes))
        while self.nbytes > self._max_bytes or len(self._entries) > self._max_entries:
            del self._entries[0]


def shared_prefix(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with in common."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    low, high = 0, size  # the lists agree up to ``low`` and not up to ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def cache_bytes(cache: Any) -> int:
    """Return the memory of a cache's keys and values."""
    return sum(layer.inner.nbytes for layer in cache.layers)
