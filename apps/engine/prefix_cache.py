"""Caches of finished answers, so that a prompt that begins alike is not computed again.

No two answers ever write to one: a cache that an answer takes is taken out, or copied if much of it
would be lost, such as another branch of a conversation, or another that began with the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_mtp.model.cache import MTPCache

MOST_LOST = 32  # ids that a cache may lose when it is taken; of more a copy is taken
LEAST_SHARED = 8  # fewer ids are not worth taking a cache away from those who share more


@dataclass(frozen=True)
class Entry:
    """A cache at rest.

    Attributes:
        ids: what it holds.
        cache: the keys and values.
        nbytes: the memory they take.
    """

    ids: list[int]
    cache: MTPCache
    nbytes: int


class PrefixCache:
    """Keeps the caches used last.

    Args:
        most_bytes: how much memory they may take together; 0 keeps none.
        most_entries: how many there may be.
    """

    def __init__(self, *, most_bytes: int, most_entries: int = 16) -> None:
        self._most_bytes = most_bytes
        self._most_entries = most_entries
        self._entries: list[Entry] = []  # the one used last stands last

    @property
    def nbytes(self) -> int:
        """Memory that the kept caches take."""
        return sum(entry.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, ids: list[int]) -> tuple[MTPCache, int] | None:
        """Take the cache that shares most with ``ids``, or a copy of it, rewound to that.

        Returns:
            The cache and how many ids it holds, always fewer than ``ids`` has; None if no cache
            shares enough.
        """
        best: tuple[int, Entry] | None = None
        for entry in self._entries:
            shared = shared_prefix(entry.ids, ids[:-1])
            if shared >= LEAST_SHARED and (best is None or shared >= best[0]):
                surplus = entry.cache.offset - shared
                best = (shared, entry) if entry.cache.can_rewind(surplus) else best
        if best is None:
            return None
        shared, entry = best
        self._entries.remove(entry)
        cache = entry.cache
        if cache.offset - shared > MOST_LOST:
            self._entries.append(entry)
            cache = cache.copied()
        cache.rewind(cache.offset - shared)
        return cache, shared

    def put(self, ids: list[int], cache: MTPCache) -> None:
        """Keep a cache that holds the first of ``ids``; the ones used least lately make room."""
        ids = ids[: cache.offset]
        nbytes = cache_bytes(cache)
        if len(ids) < max(LEAST_SHARED, cache.offset) or nbytes > self._most_bytes:
            return
        self._entries = [each for each in self._entries if each.ids != ids[: len(each.ids)]]
        self._entries.append(Entry(ids, cache, nbytes))
        while self.nbytes > self._most_bytes or len(self._entries) > self._most_entries:
            del self._entries[0]


def shared_prefix(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with in common."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # the lists agree up to ``low`` and not up to ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def cache_bytes(cache: Any) -> int:
    """Memory that the keys and values of a cache take."""
    return sum(layer.inner.nbytes for layer in cache.layers)
