"""Where the history lives: the platform's folder for data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FILE = "history.sqlite3"


def data_dir() -> Path:
    """Return the folder for files that mlx-mtp cannot make again.

    ``$MLX_MTP_DATA`` wins; else the platform's data folder plus ``mlx-mtp``.
    """
    if chosen := os.environ.get("MLX_MTP_DATA"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_DATA_HOME"):
        return Path(shared).expanduser() / "mlx-mtp"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx-mtp"
    return Path.home() / ".local" / "share" / "mlx-mtp"
