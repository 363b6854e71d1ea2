"""Writes blocks of kept beginnings to their files, in a thread of its own, while nobody waits."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mtp.apps.engine.prefix_files import PrefixFiles
from mlx_mtp.apps.engine.prefix_tree import Node

BUSY_PAUSE_S = 1.0  # pause before each file while answers are generated
_MAX_TEXTS = 64  # waiting to be written; an older one is forgotten


@dataclass(frozen=True)
class _Text:
    """A text that was used: its ids, its whole blocks, and when."""

    ids: Sequence[int]
    nodes: Sequence[Node]
    time_ns: int


class PrefixWriter:
    """Writes files while no answer is generated, or slowly while one is.

    Args:
        files: the files.

    Attributes:
        idle: set while no answer is generated.
    """

    def __init__(self, files: PrefixFiles) -> None:
        self.idle = threading.Event()
        self.idle.set()
        self._files = files
        self._texts: queue.Queue[_Text] = queue.Queue(_MAX_TEXTS)
        self._hurries = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="prompt cache files").start()

    def use(self, nodes: Sequence[Node]) -> None:
        """Write the whole blocks of a text that have no file, and note that all are in use."""
        ids = [token for node in nodes for token in node.ids]
        text = _Text(ids, list(nodes), time.time_ns())
        while nodes:
            try:
                return self._texts.put_nowait(text)
            except queue.Full:
                self._forget()

    def flush(self, *, timeout_s: float) -> bool:
        """Write all that waits, now; return whether that was possible in this time."""
        self._hurries.set()
        self.idle.set()
        deadline = time.monotonic() + timeout_s
        with self._texts.all_tasks_done:
            while self._texts.unfinished_tasks:
                if (left := deadline - time.monotonic()) <= 0:
                    return False
                self._texts.all_tasks_done.wait(left)
        return True

    def _forget(self) -> None:
        try:
            self._texts.get_nowait()
            self._texts.task_done()
        except queue.Empty:
            pass

    def _run(self) -> None:
        while True:
            text = self._texts.get()
            try:
                self._write(text)
            except Exception:  # a cache must not end the engine
                traceback.print_exc()
            finally:
                self._texts.task_done()

    def _write(self, text: _Text) -> None:
        for node, path in zip(text.nodes, self._files.paths(text.ids), strict=False):
            if node.is_dropped:
                continue
            if node.has_new_states:
                node.has_new_states = False
                self._files.renew(path)
            if self._files.has(path):
                continue
            if not self._hurries.is_set():
                self.idle.wait(BUSY_PAUSE_S)
            rows = node.rows  # before the test, as it may be dropped meanwhile
            if node.is_dropped:
                continue
            if not self._files.write(path, text.ids[: node.end], node.start, rows):
                break
        self._files.mark_used(text.ids[: text.nodes[-1].end], text.time_ns)
