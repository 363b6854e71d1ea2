"""Logs what requests ask for and the server does not do, one line per kind."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mlx_mtp.terminal import visible

LOG = logging.getLogger("mlx_mtp.server")
MAX_KINDS = 1000  # names of fields are the client's: neither the log nor this set may grow on
MAX_LENGTH = 200

Note = Callable[[str], None]


def unnoted(text: str) -> None:
    """Log nothing."""


class Hints:
    """Logs each text once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, text: str) -> None:
        """Log a text unless it has been logged before."""
        text = text[:MAX_LENGTH]
        if text not in self._seen and len(self._seen) < MAX_KINDS:
            self._seen.add(text)
            LOG.warning("%s", visible(text))
