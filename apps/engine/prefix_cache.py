"""Beginnings of texts whose keys and values are kept, so that they are not computed again.

Texts with the same beginning share the blocks of it, and every answer gets a copy, so that no two
answers write to one cache.  A block has ``block_size`` ids, or fewer at the end of a text, and an
answer may use the first part of a block.  Whole blocks can also be kept in files, which survive a
restart.

A model with recurrent layers can only continue where their states are kept.  A state takes the
memory of some thousand ids, so states are kept where a text is likely to be continued (``places``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mtp.apps.engine.prefix_files import PrefixFiles, StoredBlock
from mlx_mtp.apps.engine.prefix_tree import Node, key_of, shared_prefix
from mlx_mtp.apps.engine.prefix_writer import PrefixWriter
from mlx_mtp.apps.engine.protocol import CacheCounts
from mlx_mtp.model.caches.blocks import CacheBlocks, Rows, has_states, without_states
from mlx_mtp.model.caches.mtp_cache import CHECKPOINT_MARGIN, MTPCache

BLOCK_SIZE = 256
FLUSH_S = 4.0
MIN_SHARED = 8  # a shorter common beginning is computed again
STATE_SPACING = 2048
NUM_RECENT = 3  # states at the end of a text that may be closer


@dataclass(frozen=True)
class Beginning:
    """A cache for a new answer.

    Attributes:
        cache: the keys and values; nobody else writes to it.
        num_ids: number of ids in it.
        num_read: number of them that were read from files for this answer.
    """

    cache: MTPCache
    num_ids: int = 0
    num_read: int = 0


class PrefixCache:
    """Keeps the most recently used beginnings.

    All methods but ``read`` are for the thread that calls MLX.

    Args:
        blocks: cuts and joins the caches of the model.
        max_bytes: maximum memory of all together; 0 keeps none.
        files: the files, if there are any.
        block_size: ids per block.

    Attributes:
        nbytes: memory of the kept blocks.
    """

    def __init__(
        self,
        blocks: CacheBlocks,
        *,
        max_bytes: int,
        files: PrefixFiles | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.nbytes = 0
        self._num_dropped = 0
        self._reported = (0, 0)
        self.files = files
        self._writer = PrefixWriter(files) if files else None
        self._blocks = blocks
        self._max_bytes = max_bytes
        self._block_size = block_size
        self._root = Node([])
        self._nodes: OrderedDict[Node, None] = OrderedDict()  # the latest used one last
        self._lock = threading.Lock()  # of the children, which ``read`` looks at

    def __len__(self) -> int:
        return len(self._nodes)

    def make_cache(self) -> MTPCache:
        """Make a cache without rows."""
        return self._blocks.make_cache()

    def take(self, ids: Sequence[int]) -> Beginning:
        """Copy the longest kept beginning of a text, always without its last id.

        Returns:
            A cache with that many ids; an empty one if too few are kept.
        """
        path, num_ids = self._find(ids)
        if num_ids < MIN_SHARED:
            return Beginning(self._blocks.make_cache())
        num_read = sum(min(node.end, num_ids) - node.start for node in path if node.was_read)
        for node in path:
            node.was_read = False
        self._use(path)
        cache = self._blocks.join([node.rows for node in path], num_ids)
        return Beginning(cache, num_ids, num_read)

    @property
    def has_states(self) -> bool:
        """Whether the model has states, which are known at the end of a chunk only."""
        return self._blocks.has_states

    def places(self, ids: Sequence[int]) -> list[int]:
        """Positions of a prompt at which states are kept; empty if the model has none.

        They are the prompt's end, the last whole block before it, because a chat template may
        change the last ids when the conversation goes on, the last whole block that another text
        shares, such as a system prompt, and every ``STATE_SPACING`` ids.
        """
        if not self.has_states:
            return []
        last, shared = len(ids) - 1, self.num_stored(ids)
        blocks = {self._whole_end(end) for end in (len(ids) - CHECKPOINT_MARGIN, shared)}
        places = {last, *blocks, *range(0, last, STATE_SPACING)} - {0}
        return sorted(filter(self._blocks.is_chunk_end, places))

    def chunk_size(self, start: int, places: Sequence[int], limit: int) -> int:
        """Number of ids of a prompt's next chunk, so that chunks end at all ``places``.

        Args:
            start: number of ids before the chunk.
            places: positions in rising order.
            limit: maximum number of ids.
        """
        return min([limit, *(place - start for place in places if place > start)])

    def num_stored(self, ids: Sequence[int]) -> int:
        """Number of first ids of a text that are stored, even if no cache can end there."""
        if not self.has_states:
            return self.num_known(ids)
        path = list(self._whole_blocks(ids[:-1]))
        parent = path[-1] if path else self._root
        rest = ids[parent.end : -1]
        shared = (shared_prefix(node.ids, rest) for node in parent.children.values())
        return parent.end + max(shared, default=0)

    def num_known(self, ids: Sequence[int]) -> int:
        """Number of ids that ``take`` would return."""
        return self._find(ids)[1]

    def put(
        self,
        ids: Sequence[int],
        cache: MTPCache,
        *,
        num_prompt: int,
        with_states: bool = False,
    ) -> None:
        """Keep the rows of an answer's cache; drop other blocks to make room.

        A cache with a window has dropped rows: those must have been put before.

        Args:
            ids: the ids of the text so far.
            cache: the rows of the first of them.
            num_prompt: number of ids of the prompt.
            with_states: whether to keep the states of recurrent layers as they are now.
        """
        if self._max_bytes == 0:
            return
        parent, path = self._root, []
        num_rows = self._blocks.num_shared(cache, num_prompt)
        while parent.end < num_rows:
            end = min(parent.end + self._block_size, num_rows)
            part = ids[parent.end : end]
            node = self._child(parent, part) or self._cut(parent, part, cache)
            if node is None:
                break
            path.append(node)
            parent = node
        if with_states and path:
            self._add_states(path, cache)
        self._touch(path)

    def keep(self, ids: Sequence[int], cache: MTPCache, *, num_prompt: int) -> None:
        """Put a cache at the end of an answer, and write its blocks to files; see ``put``."""
        self.put(ids, cache, num_prompt=num_prompt, with_states=self.has_states)
        path, _ = self._find([*ids[: cache.offset], -1])
        self._use(path)

    def read(self, ids: Sequence[int]) -> list[StoredBlock]:
        """Read from files what memory lacks of the beginning of a text; for any thread."""
        if self.files is None:
            return []
        with self._lock:
            known = sum(len(node.ids) for node in self._whole_blocks(ids[:-1]))
        return self.files.read(ids[:-1], known)

    def add(self, ids: Sequence[int], blocks: Sequence[StoredBlock]) -> None:
        """Add what ``read`` returned for ``ids``."""
        path = list(self._whole_blocks(ids[:-1]))
        for block in blocks:
            parent = path[-1] if path else self._root
            if block.start == parent.end:
                node = self._insert(
                    parent, ids[block.start : block.start + self._block_size], block.to_rows()
                )
                node.was_read = True
                path.append(node)
        if blocks:
            self._touch(path)

    def counts(self) -> CacheCounts:
        """Return sizes, and what was dropped and removed since the last call."""
        num_removed = self.files.num_removed if self.files else 0
        now = (self._num_dropped, num_removed)
        before, self._reported = self._reported, now
        return CacheCounts(
            memory_bytes=self.nbytes,
            file_bytes=self.files.nbytes if self.files else 0,
            num_dropped=now[0] - before[0],
            num_removed=now[1] - before[1],
        )

    def pause_writing(self) -> None:
        """Write files slowly, because an answer is generated."""
        if self._writer:
            self._writer.idle.clear()

    def resume_writing(self) -> None:
        """Write files without pauses."""
        if self._writer:
            self._writer.idle.set()

    def close(self) -> None:
        """Write what waits to be written, within a few seconds; for any thread."""
        if self._writer:
            self._writer.flush(timeout_s=FLUSH_S)

    def _find(self, ids: Sequence[int]) -> tuple[list[Node], int]:
        """The blocks of the longest kept beginning of a text and its length."""
        ids = ids[:-1]
        path = list(self._whole_blocks(ids))
        while True:
            parent = path[-1] if path else self._root
            rest, best = ids[parent.end : parent.end + self._block_size], (0, parent)
            for node in parent.children.values():
                shared = shared_prefix(node.ids, rest)
                if shared > best[0] and self._can_end(node, parent.end + shared):
                    best = (shared, node)
            if best[0]:
                return [*path, best[1]], parent.end + best[0]
            if not path or self._can_end(parent, parent.end):
                return path, parent.end
            path.pop()

    def _can_end(self, node: Node, position: int) -> bool:
        return self._blocks.can_end(node.rows, position, end=node.end)

    def _whole_end(self, position: int) -> int:
        """Where the last whole block up to a position ends."""
        return max(position, 0) // self._block_size * self._block_size

    def _add_states(self, path: Sequence[Node], cache: MTPCache) -> None:
        """Give the last block the states after it; drop those that are close before it."""
        last, known = path[-1], [node for node in path if has_states(node.rows)]
        if last not in known:
            states = self._blocks.states(cache, last.end)
            if not states:
                return
            self._set_rows(last, {**last.rows, **states})
            last.has_new_states = True
            known.append(last)
        for node in known[:-NUM_RECENT]:
            if node.end % STATE_SPACING and not node.branches:
                self._set_rows(node, without_states(node.rows))

    def _set_rows(self, node: Node, rows: Rows) -> None:
        self.nbytes -= node.nbytes
        node.rows = rows
        self.nbytes += node.nbytes

    def _whole_blocks(self, ids: Sequence[int]) -> list[Node]:
        """The whole blocks that a text begins with."""
        node, path = self._root, []
        while node.end + self._block_size <= len(ids):
            child = node.children.get(key_of(ids[node.end : node.end + self._block_size]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _child(self, parent: Node, ids: Sequence[int]) -> Node | None:
        """The block after ``parent`` that begins with these ids and may end after them."""
        if node := parent.children.get(key_of(ids)):
            return node
        for node in parent.children.values() if len(ids) < self._block_size else ():
            is_longer = shared_prefix(node.ids, ids) == len(ids)
            if is_longer and self._can_end(node, parent.end + len(ids)):
                return node
        return None

    def _cut(self, parent: Node, ids: Sequence[int], cache: MTPCache) -> Node | None:
        """Add a block from a cache, in place of a shorter one with the same beginning."""
        start, end = parent.end, parent.end + len(ids)
        shorter = [
            node
            for node in parent.children.values()
            if shared_prefix(node.ids, ids) == len(node.ids)
        ]
        rows = self._blocks.cut(cache, start, end)
        for node in shorter if rows is None else ():
            more = self._blocks.cut(cache, node.end, end)
            rows = more and self._blocks.extended(node.rows, more)
        if rows is None:
            return None
        for node in shorter:
            if self._blocks.can_end(rows, node.end, end=end) or self._is_of_no_use(node):
                self._remove(node)
        return self._insert(parent, ids, rows)

    def _is_of_no_use(self, node: Node) -> bool:
        """Whether no cache can end in a block, once there is a longer one."""
        return self.has_states and not has_states(node.rows)

    def _insert(self, parent: Node, ids: Sequence[int], rows: Rows) -> Node:
        node = Node(list(ids), parent.end, parent, rows)
        with self._lock:
            parent.children[key_of(ids)] = node
        self._nodes[node] = None
        for each in node.path():  # a block is older than those before it
            self._nodes.move_to_end(each)
        self.nbytes += node.nbytes
        return node

    def _remove(self, node: Node) -> None:
        assert node.parent is not None and not node.children
        with self._lock:
            del node.parent.children[key_of(node.ids)]
        del self._nodes[node]
        self.nbytes -= node.nbytes
        node.is_dropped = True  # before the rows, for the thread that writes files
        node.rows = {}

    def _touch(self, path: Sequence[Node]) -> None:
        """Note that blocks are used, the first as the latest, and drop others to make room."""
        for node in reversed(path):
            self._nodes.move_to_end(node)
        while self.nbytes > self._max_bytes:
            self._remove(next(iter(self._nodes)))  # children are older than their parent
            self._num_dropped += 1

    def _use(self, path: Sequence[Node]) -> None:
        self._touch(path)
        if self._writer:
            self._writer.use([node for node in path if len(node.ids) == self._block_size])
