"""Plots as files: matplotlib without a display, and files written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Without dates and versions, the same figure gives the same file.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def figure_class(extra: str = "bench") -> Any:
    """Return matplotlib's ``Figure``; pyplot would need a display and keep figures.

    Args:
        extra: extra of the package that installs matplotlib.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = f'plots need matplotlib: pip install "mlx-mtp[{extra}]"'
        raise ValueError(message) from None
    return Figure


def save_figure(figure: Any, path: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure, each file atomically; the same figure gives the same files.

    Args:
        figure: a matplotlib figure.
        path: file name, whose extension is replaced.
        formats: among ``png`` and ``svg``.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written; an existing one is unchanged.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(f".{extension}") for extension in formats]
    with rc_context({"svg.hashsalt": path.name}):
        for extension, file in zip(formats, files, strict=True):
            draft = file.with_name(f".{file.name}.{os.getpid()}")
            metadata = _METADATA[extension]
            try:
                figure.savefig(draft, format=extension, dpi=120, metadata=metadata)
                os.replace(draft, file)
            finally:
                draft.unlink(missing_ok=True)
    return files
