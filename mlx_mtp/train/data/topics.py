"""A user's topics for self-distillation, a file of one topic per line."""

from __future__ import annotations

from pathlib import Path


def read_topics(path: Path) -> tuple[str, ...]:
    r"""Read a file of one topic per line; ``\n`` is a line break, blank lines are skipped.

    Raises:
        ValueError: it is not UTF-8 or empty.
        OSError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    topics = tuple(line.strip().replace("\\n", "\n") for line in lines if line.strip())
    if not topics:
        raise ValueError(f"{path} contains no topics")
    return topics
