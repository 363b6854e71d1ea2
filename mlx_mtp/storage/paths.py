"""Folders of this program: the cache, and data that cannot be created again.

``$MLX_MTP_CACHE`` and ``$MLX_MTP_DATA`` win, then ``$XDG_CACHE_HOME`` and ``$XDG_DATA_HOME`` (on
macOS too), then the platform's own folders.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

APP_NAME = "mlx-mtp"
HISTORY_FILE = "history.sqlite3"


def cache_dir() -> Path:
    """Return the folder for files that mlx-mtp can create again."""
    folder = os.environ.get("MLX_MTP_CACHE") or platformdirs.user_cache_dir(APP_NAME, False)
    return Path(folder).expanduser()


def data_dir() -> Path:
    """Return the folder for files that mlx-mtp cannot create again, e.g. the chat history."""
    folder = os.environ.get("MLX_MTP_DATA") or platformdirs.user_data_dir(APP_NAME, False)
    return Path(folder).expanduser()
