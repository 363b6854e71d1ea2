"""Texts as a tree of blocks: the children of a block continue its text."""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mlx_mtp.model.caches.blocks import Rows, num_bytes


@dataclass(eq=False, slots=True)
class Node:
    """A block of a text.

    Attributes:
        ids: its ids.
        start: position of the first.
        parent: the block before; None for the root, which has no ids.
        rows: keys and values, and the states after them where they are known; empty once they were
            dropped from memory.
        is_dropped: whether that is so.
        children: blocks that continue the text, by ``key_of`` their ids.
        was_read: whether its rows were read from a file and not used since.
        has_new_states: whether it got states that its file does not have.
    """

    ids: list[int]
    start: int = 0
    parent: Node | None = None
    rows: Rows = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    was_read: bool = False
    is_dropped: bool = False
    has_new_states: bool = False

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return num_bytes(self.rows)

    @property
    def end(self) -> int:
        """Position after the last id."""
        return self.start + len(self.ids)

    @property
    def branches(self) -> bool:
        """Whether the text continues in different ways, not only for different lengths."""
        texts = [child.ids for child in self.children.values()]
        longest = max(texts, key=len, default=[])
        return any(shared_prefix(text, longest) < len(text) for text in texts)

    def path(self) -> Iterator[Node]:
        """This block and those before it, the last first, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


def key_of(ids: Sequence[int]) -> bytes:
    """Return the key of a block among the children of another."""
    return array.array("q", ids).tobytes()


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    low, high = 0, size  # the lists agree up to ``low`` and not up to ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
