"""Asynchronous access to the history: one dedicated thread reads and writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mlx_mtp.apps.history.store import History

Result = TypeVar("Result")


class Archive:
    """Runs calls on a history, one at a time, in a thread.

    Args:
        path: the history file.

    Raises:
        ValueError: the file is not a history.
    """

    def __init__(self, path: Path) -> None:
        self._history = History(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="history")

    async def __call__(self, call: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Run ``call(history, ...)``, a method of ``History`` or a function that takes one."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, lambda: call(self._history, *args, **options)
        )

    def close(self) -> None:
        """Finish running calls, then close the file."""
        self._thread.shutdown(wait=True)
        self._history.close()
