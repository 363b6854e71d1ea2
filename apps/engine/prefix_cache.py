"""Caches of finished answers, so that a shared prefix of prompts is computed only once.

No two answers write to the same cache: an answer removes the cache that it uses, or copies it if
much of it would be lost, for example another branch of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_mtp.model.cache import MTPCache

MAX_LOST = 32  # ids that a cache may lose when it is taken; otherwise it is copied
MIN_SHARED = 8  # for fewer ids a cache is left to prompts that share more


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
    """Stores the caches used most recently.

    Args:
        max_bytes: maximum memory of all caches; 0 stores none.
        max_entries: maximum number of caches.
    """

    def __init__(self, *, max_bytes: int, max_entries: int = 16) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: list[Entry] = []  # in order of last use

    @property
    def nbytes(self) -> int:
        """Memory of the stored caches."""
        return sum(entry.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, ids: list[int]) -> tuple[MTPCache, int] | None:
        """Take the cache with the longest shared prefix, or a copy of it, rewound to that prefix.

        Returns:
            The cache and the number of ids in it, always fewer than in ``ids``; None if no cache
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
        """Store a cache of the first of ``ids``; the least recently used ones are dropped."""
        ids = ids[: cache.offset]
        nbytes = cache_bytes(cache)
        if len(ids) < max(MIN_SHARED, cache.offset) or nbytes > self._max_bytes:
            return
        self._entries = [entry for entry in self._entries if entry.ids != ids[: len(entry.ids)]]
        self._entries.append(Entry(ids, cache, nbytes))
        while self.nbytes > self._max_bytes or len(self._entries) > self._max_entries:
            del self._entries[0]


def shared_prefix(one: list[int], other: list[int]) -> int:
    """Return the length of the longest common prefix."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    low, high = 0, shorter  # the lists agree up to ``low`` and not up to ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def cache_bytes(cache: Any) -> int:
    """Return the memory of a cache's keys and values."""
    return sum(layer.inner.nbytes for layer in cache.layers)
